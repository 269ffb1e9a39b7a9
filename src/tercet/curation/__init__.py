"""Raw text into a corpus: rules, copies, test texts, mixtures, shards."""

PRESETS = ("none", "light", "web")  # sets of rules; `tercet.curation.filters` says which
