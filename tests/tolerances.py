"""Every tolerance of the tests that compare numbers, each with its reason.

Tokens, survivors, cache bytes and stored weights are compared exactly and stand nowhere here.
"""

# Largest absolute difference of prefill logits, float32 against Hugging Face eager. Logits are of
# order 1; other orders of summation over a few layers leave some 1e-6, issue 2 allows 1e-4.
LOGITS_FLOAT32 = 1e-4

# Scores nearer than this may fall either way: attention in float32 against a decision in float64.
NEAR_TIE = 1e-6
