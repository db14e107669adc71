"""Scripts, and what benchmarks and tests take from them."""
