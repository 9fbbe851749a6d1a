"""The check of a CUDA machine: all that only such a machine can tell, in two commands.

A machine with a GPU is rented by the minute, so a command has a limit in seconds, each of its steps
has a share of it, and what has been found is on disk after every step.

    plan.py      the steps of both commands and their limits
    runner.py    runs them, some side by side, and stops what takes too long
    report.py    report.json, logs.tar.gz, and the results of several commands as one file
    machine.py   what the machine has; makes the extension importable
    run_tests.py, each_test.py    pytest, where a fault costs one test
    stand_in.py  runs the scripts of bench/ without a GPU, for --dry-run
"""
