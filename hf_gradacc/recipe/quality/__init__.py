"""What a recipe measures beside the loss: answers, their scores, samples.

Read `quality`.
"""
