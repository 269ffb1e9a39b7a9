"""Documents and conversations into token batches: readers, chat masks, packing."""
