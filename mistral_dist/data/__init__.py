"""From raw files to micro-batches, one file per stage, in the order in which data flow.

sources   files, folders, hub data sets        -> rows with their place
clean     rows                                 -> examples; what is dropped is counted and kept
split     examples                             -> train | validation | test
encode    example                              -> token ids and targets
prepare   all of the above, once               -> a data directory: Arrow shards, lengths, manifest
pack      lengths                              -> packs of whole examples
stream    data directory, step                 -> the micro-batches of this rank, and the cursor after them
"""
