"""Turn raw text into a corpus: rules, copies, test texts, mixtures, shards."""
