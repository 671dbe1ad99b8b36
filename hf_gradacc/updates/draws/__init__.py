"""What is drawn at random for a row belongs to the row, however updates are cut.

Read `rows`, then `randomness`.
"""
