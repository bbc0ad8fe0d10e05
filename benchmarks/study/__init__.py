"""The study: whether kin's knowledge makes a better small model, how much better, and when it does not.

Protocols are files in ``protocols/``; methods are in ``methods.json``. Every method gets the same images, closed-form
start, teacher, steps and seeds. ``python -m benchmarks.study --help`` tells how to run it.
"""
