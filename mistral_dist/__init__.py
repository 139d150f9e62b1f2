"""Fine-tune Mistral-7B with QLoRA on any machines: one run, the same result.

One word for each thing: an *example* is encoded to token ids, of which some are *target tokens*; whole examples make a
*pack*; packs make a *micro-batch*, micro-batches a *global batch*, and a global batch one *step*.
"""

__version__ = "0.1.0"
