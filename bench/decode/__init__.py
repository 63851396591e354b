"""`python -m bench decode`: one decoding step over paged keys and values, against dense attention of one query."""
