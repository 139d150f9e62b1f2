"""A finished run or an exported folder -> an OpenAI-compatible endpoint, on an engine that exists.

served     what lies at a place, as an engine needs it
engines    the command that serves it: vLLM, or `transformers serve`
guard      what asks for the key in vLLM's process
verb       the checks, then the engine in our place: health, metrics and a graceful stop are its own
"""
