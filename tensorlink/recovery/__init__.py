"""How a run survives its peers: what is lost is noticed, taken over from a snapshot, and done again from a journal.

accusations.py  verdicts of fraud, executed again before anything follows
heartbeat.py    a rig that answers no more is given up
snapshots.py    a stage's state at a step, fetched from its rig onto the user's disk
keeper.py       when it is fetched, and how long it is kept
journal.py      what was asked of the stages since then
rigs.py         who takes over
recovery.py     the story: lose, plan anew, load, do again
"""
