"""How loss falls with size, data and compute, and how sure one can be: laws, fits and small experiments.

The rooms so far: :mod:`laws` and :mod:`frontiers`; :mod:`fitting`, :mod:`least_squares`, :mod:`fit_intervals` and
:mod:`fit_reports`; :mod:`ridge_theory`; :mod:`sweeps` and :mod:`record`; :mod:`parameterisation`, :mod:`schedules`,
:mod:`lr_search` and :mod:`batches`; :mod:`corpora`, :mod:`repeats` and :mod:`domains`; :mod:`data_diet`,
:mod:`reweighting`, :mod:`capacity`, :mod:`connectivity` and :mod:`sample_complexity`.
"""
