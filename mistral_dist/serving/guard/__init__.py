"""A folder for the PYTHONPATH of vLLM: what its process needs of ours, and nothing else."""
