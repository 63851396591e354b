"""The Triton path: scoring with top-n, and selected attention. Nothing else in the library imports triton."""
