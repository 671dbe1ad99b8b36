"""Optimizers and their schedules: groups of parameters, Muon, low precision.

Read `groups`.
"""
