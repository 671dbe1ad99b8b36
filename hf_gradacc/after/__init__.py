"""What is done with a run once it is trained: talk to it, merge it, push it.

`saved` finds the model in a folder and loads it; each command has a file of its own.
"""
