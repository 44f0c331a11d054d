"""Plans a job before there is a cluster: where the tables go, whether it fits, what a step takes.

    case = read_case(...)            cases.py      the model, its tables and the world, from a config and a schema
    found = find_plan(case)          search.py     TorchRec's planner over it, alternatives included
    estimate = estimate_plan(...)    estimate.py   memory and time of every rank
    print(report(...))               text.py, picture.py

``docs/planner.md`` states every formula and what was checked.
"""
