"""Every tolerance of the tests that compare numbers, each with its reason.

Tokens, survivors, cache bytes and stored weights are compared exactly and stand nowhere here.
"""

# Largest difference of a logit at any token, float32 against Hugging Face eager. Logits are of
# order 1; other orders of summation over a few layers leave some 1e-6, issue 2 allows 1e-4.
LOGITS_FLOAT32 = 1e-4

# Scores nearer than this may fall either way: attention in float32 against a decision in float64.
NEAR_TIE = 1e-6

# Megabytes that 200 requests after a warm-up of 20 may add to the process. One image's features are
# 4 kB and one cache 250 kB here, so a leak of either per request shows; allocators move by less.
GROWTH_MB = 6.0

# Largest difference of a prefill logit, float16 weights and rows against float32. Rounding is
# 2^-11 per operation; through 4 layers, with logits of deviation about 1.3, a hundredth remains.
LOGITS_FLOAT16 = 0.05

# Largest difference of a logit between two lowerings in float32: the same sums in another order.
LOWERED_FLOAT32 = 1e-5

# Largest difference of a logit between a bundle and Hugging Face, parts in the same half types:
# both round after each operation, to 2^-11, but not at the same places.
LOGITS_MIXED = 0.03

# Largest difference of a logit, a GPU's against the CPU's in float32. float32 engines multiply in
# TF32 (2^-11 per product, as float16); bfloat16 keeps 8 bits, so three bits more are lost.
LOGITS_GPU = {"float32": LOGITS_FLOAT16, "float16": LOGITS_FLOAT16, "bfloat16": 8 * LOGITS_FLOAT16}

# Megabytes of device memory that 200 requests after a warm-up may add: cudaMalloc gives 2 MB pages.
GROWTH_DEVICE_MB = 6.0
