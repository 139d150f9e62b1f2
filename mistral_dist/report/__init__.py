"""A run, or several side by side, as one HTML file that needs no network.

facts      what a run directory says
charts     facts -> pictures
compare    what differs between runs, in recipe and result
page       all of it -> HTML
"""
