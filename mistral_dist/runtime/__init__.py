"""The only room that knows Accelerate, DeepSpeed, torch.distributed, signals and the environment.

process    this process: environment variables, signals, death with its launcher
launcher   `accelerate launch`: the line, the children, the exit code
engine     the ranks: device, prepare, backward, reductions, stop requests
shards     optimizer state by parameter name, whatever the ZeRO stage and the number of ranks
"""
