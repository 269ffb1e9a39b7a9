"""Facts about characters that word hashing and text statistics share."""

TABLE_SIZE = (
    0x33480  # tables of character classes end above the last ideographs; no later character is a letter
)
# Scripts that are written without spaces: Thai and Lao, Burmese, Khmer, kana, ideographs. Each character is a word.
UNSPACED_RANGES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
)  # fmt: skip
HASH_BASE = 0x9E3779B97F4A7C15  # of polynomial hashes; odd, so that its powers have inverses modulo 2^64
