"""Single-GPU debug mode: some steps of the user's own recipe in one process, looked at from all sides.

mode       what `mistral-dist train --debug` does: the recipe cut short, two launches, the report
worker     the process that trains and looks
findings   what is looked at: functions of a model, a batch or a file, each with a finding
borders    whether attention stays within an example
blame      where a number that is none first appears
"""

FILE = "debug.jsonl"
"""In the run directory: the findings, one a line, and the mark by which a run of the debug mode is known."""
