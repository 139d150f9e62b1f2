"""A finished run -> a folder that can be served, and whether it is the model that was trained.

forms      what can be written
merge      base + adapter -> the weights of one model, in bounded memory
likeness   a form beside the live adapter
folder     what lies beside the weights
push       such a folder -> the hub
verb       the export, in order
"""
