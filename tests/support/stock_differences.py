"""Where our trainer is meant to differ from the stock one: the claim of stock, and the reason.

A claim named here must hold for stock and fail for ours. The design note on the stock suite shows
the same table to users.
"""

_RAISED = "a loss or gradient that is not finite is raised, with the rows it came from"
_FILES = "the run's log, its facts, and each checkpoint's manifest are files of ours"
_RESUME = "the step does not say which rows come next, so a changed batch or dataset is refused"

DIFFERENCES: dict[str, str] = {
    "test_a_loss_that_is_not_finite_is_logged_if_unfiltered": _RAISED,
    "test_a_loss_that_is_not_finite_is_filtered_from_the_log": _RAISED,
    "test_the_output_folder_holds_checkpoints_only": _FILES,
    "test_checkpoints_hold_nothing_else": _FILES,
    "test_another_batch_size_is_taken_on_resume": _RESUME,
    "test_other_rows_are_taken_on_resume": _RESUME,
    "test_the_default_callbacks_are_there": "our parts keep their state and print as callbacks",
    "test_two_runs_end_in_the_same_state": "the ledger keeps the wall time of each update",
    "test_with_a_limit_of_one_only_the_best_checkpoint_remains": (
        "the newest checkpoint stays beside the best, so that a resume does not go back"
    ),
}
