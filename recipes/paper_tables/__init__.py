"""The two tables of Kawaguchi & Sun's experiments, as this program measures them: rank of [h, 1], and test errors.

`command` has the options and the loop over the runs, `cells` executes one run, `ledger` stores results, `page` renders them.
"""
