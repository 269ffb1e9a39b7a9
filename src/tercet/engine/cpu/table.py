"""The table that describes a model and a step to the compiled code: 64-bit integers and addresses.

One compiled program serves every model: models differ in the data of the table. `backend` fills the table and
`kernels` reads it. The names here are indices into it.
"""

from __future__ import annotations

GROUP = 32  # activations that share a scale
PAGE = 64  # positions in a page of keys and values
LANES = 16  # of a vector, and rows in a block of weights
QUERIES = (1, 4)  # of an attention tile

# Threads and barriers.
(
    THREADS,  # threads that take part in this step
    ARRIVED,  # address of the pool's count of arrivals at barriers, which never falls: a late thread need not wait
    BEFORE,  # arrivals before this step
    WAITED,  # address: for each thread, 64 bytes apart, turns it has waited at barriers
    COUNTERS,  # address: for each phase, items drawn beyond those dealt in advance
    # The step.
    HEAD_ONLY,  # 1: only the head, for rows that the last step left in X
    TOKENS,  # T: rows of activations
    IDS,  # address [T]
    POSITIONS,  # address [T]
    CHUNK_OF,  # address [T]: which chunk a row belongs to
    CHUNKS,  # address [chunks, 3]: first row, first position, address of the chunk's pages
    TILES,  # number of attention tiles (before heads)
    TILE_TABLE,  # address [tiles, 3]: chunk, first row within it, rows
    STATES_ONLY,  # 1: no logits, but the rows that the head would read, in NORMED
    SELECTED,  # number of rows that the head reads
    SELECTED_ROWS,  # address [SELECTED]: their indices
    LOGITS,  # address [SELECTED, vocabulary in blocks]
    # The model's shape.
    LAYERS,
    HIDDEN,  # row length, in floats, padded to 64
    HIDDEN_SIZE,  # without padding
    HEADS,
    KV_HEADS,
    DIM,  # of a head, padded to 16
    DIM_SIZE,  # without padding
    ROTARY_HALF,  # pairs that are rotated
    INNER,  # row length of the feed-forward layer, padded to 64
    ATTENTION_WIDTH,  # row length of attention outputs, padded to 64
    GATE,  # addresses of functions in `programs`
    STORE,
    ATTEND_ONE,
    ATTEND_FOUR,
    ATTENTION_CAP,  # bits of a float32; 0: none
    LOGIT_CAP,
    GATED,
    LAYER_NORM,
    EPS,  # bits
    PRE_NORM,
    POST_NORM,
    PARALLEL,
    QK_NORM,  # 0, 1 (each head), 2 (the whole projection)
    EXPERTS_PER_TOKEN,
    EXPERTS,
    NORMALIZE,
    # Data.
    FLOATS,  # address: attention scale, embedding scale, eps
    LAYER_TABLE,  # address [layers, LAYER_WIDTH]
    EMBEDDING,  # address of a matrix's descriptor
    LEARNED_POSITIONS,  # address of float32 [positions, HIDDEN], or 0
    FINAL_NORM,  # address
    FINAL_NORM_BIAS,
    HEAD,  # address of a matrix's descriptor
    KEYS_VALUES,  # address of the pages
    PAGE_BYTES,  # of one page, all layers
    PLANE_BYTES,  # of the keys (or the values) of one head of one layer
    # Scratch, float32 unless said.
    X,  # [T, HIDDEN]: the residual stream
    NORMED,  # [T, HIDDEN]
    QUANTIZED,  # int8 [T, 2 * widest]
    SCALES,  # [T, widest / 32]
    SUMS,  # int32 [T, widest / 16]: sums of the quantised values
    QKV,  # [T, heads * DIM]
    ATTENDED,  # [T, ATTENTION_WIDTH]
    OUTPUT,  # [T, HIDDEN]: of attention or the feed-forward layer, where it is not added to X at once
    INNER_ROWS,  # [T * experts per token, INNER]
    ROUTES,  # int64 [T, experts per token]
    ROUTE_WEIGHTS,  # [T, experts per token]
    PRIVATE,  # scratch of the threads, one after the other
    PRIVATE_BYTES,  # of each thread
    # Adapters (see `lowrank`).
    RUNS,  # number of runs in this step: consecutive rows with the same adapter
    RUN_TABLE,  # address [RUNS, RUN_WIDTH]
    LOW_ROWS,  # [T, LOW_WIDTH]: A x
    LOW_WIDTH,
    LOW_PRODUCT,  # address of the function that multiplies by float32 weights
    SIZE,
) = range(72)

# A layer.
(
    INPUT_NORM,
    INPUT_NORM_BIAS,
    QKV_MATRIX,  # addresses of descriptors
    Q_NORM,
    K_NORM,
    O_MATRIX,
    ATTENTION_OUTPUT_NORM,
    MLP_NORM,
    MLP_NORM_BIAS,
    GATE_UP,  # a descriptor, or the first of the experts'
    DOWN,
    ROUTER,  # 0: a plain feed-forward layer
    MLP_OUTPUT_NORM,
    WINDOW,
    COSINES,  # float32 [positions, ROTARY_HALF]; 0: no rotation
    SINES,
    LAYER_WIDTH,
) = range(17)

# A matrix.
(
    PRODUCT,  # address of the function that multiplies by it
    ROW,  # address of the function that reads a row of it
    QUANTIZE,  # address of the function that prepares activations for it and for what follows it, or 0
    QUANTIZED_BYTES,  # of a row of activations that was prepared
    BLOCK_BYTES,  # weights of 16 rows
    SCALE_BYTES,  # their scales
    WEIGHTS,
    WEIGHT_SCALES,
    BIAS,
    BLOCKS,  # of this matrix and of those that follow it
    OWN_BLOCKS,
    COLUMNS,
    NEXT,  # address of the descriptor of the matrix that goes on below this one, in another form; 0: none
    ALTERNATE,  # 1: blocks of this matrix and of the next alternate
    MATRIX_WIDTH,
) = range(15)

# A run of rows with one adapter.
(
    RUN_ADAPTER,  # address of the adapter's changes [layers, CHANGES, CHANGE_WIDTH]
    RUN_BEGIN,  # first row
    RUN_ROWS,
    RUN_WIDTH,
) = range(4)

# The phases whose work threads draw from a counter: the products, and the attention. A layer has all but the
# head's product, which is counted as one layer more.
(
    QKV_PRODUCT,
    O_PRODUCT,
    GATE_UP_PRODUCT,
    DOWN_PRODUCT,
    HEAD_PRODUCT,
    ATTENTION_PHASE,
    PHASES,
) = range(7)

CHANGES = HEAD_PRODUCT  # products of a layer, all of which an adapter may change

# An adapter's change of one matrix.
(
    LOW_BLOCKS,  # of A, in blocks of 16 rows; 0: no change
    LOW_COLUMNS,  # of A
    LOW_WEIGHTS,  # address of A
    HIGH_TABLE,  # address [the matrix's blocks, HIGH_WIDTH]
    CHANGE_WIDTH,
) = range(5)

# An adapter's change of one block of a matrix.
(
    HIGH_WEIGHTS,  # address of the block of B; 0: no change
    HIGH_BEGIN,  # index of the first value of A x that it is multiplied by
    HIGH_COLUMNS,
    HIGH_WIDTH,
) = range(4)

# Kinds of matrices (see `formats`).
FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = range(11)
SMALL = 2  # up to this many rows, every thread prepares all of them itself rather than wait for the others

# The control block of a pool of threads, in bytes.
GENERATION, STEP_TABLE = 0, 8
CREW = 256  # a generation is this times the number of the step, plus the number of threads that take part
# For each thread, a cache line apart. WAITING is followed by nanoseconds and the scratch of `threads.now`.
PARKED, WAITING = 64, 72


def state_bytes(queries: int, head_dim: int) -> int:
    """Return the bytes of an attention tile's state: maxima, sums, weights and outputs."""
    return 4 * queries * (LANES + LANES + PAGE + head_dim)
