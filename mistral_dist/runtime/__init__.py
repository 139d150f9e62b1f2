"""The only room that knows Accelerate, DeepSpeed, torch.distributed, signals and the environment.

process    this process: environment variables, signals, death with its launcher
launcher   `accelerate launch`: the line, the children, the exit code
causes     why workers ended without a word
engine     the ranks: device, prepare, backward, reductions
control    what asks a rank to stop, and how all agree on it
watch      who is hung, who is slow; pace: how long a rank's own forwards take
drift      ranks that run other code, libraries, recipe or data
memory     where it ran out, what held it, what to type
trackers   experiment trackers, where the metrics are shown, too
zero       what a DeepSpeed configuration may say
shards     optimizer state by parameter name, whatever the ZeRO stage and the number of ranks
"""
