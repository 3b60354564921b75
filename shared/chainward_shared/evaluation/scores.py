"""The figures by which a classifier is judged; `M` of `metrics.json`."""

from __future__ import annotations

from chainward_shared.outside import Count, Fraction, Record


class Scores(Record):
    """Metrics of one model on one set of cases.

    Attributes
    ----------
    n : number of cases
    accuracy : fraction classified correctly
    balanced_accuracy : mean recall over the classes that occur; None without cases
    macro_auc : mean one-vs-rest area under the ROC curve over the classes with cases and non-cases; None without one
    ece : expected calibration error, 15 equal-width bins of confidence (Guo et al. 2017)

    Multi-label, where each class is a yes-or-no decision about each case, at a probability of 0.5:

    accuracy : fraction of all decisions that are correct
    balanced_accuracy : mean of (sensitivity + specificity) / 2 over the findings with cases and non-cases; None without one
    macro_auc : mean area over the same findings
    ece : over all decisions; the confidence of one is the probability of what was decided
    """

    n: Count
    accuracy: Fraction | None
    balanced_accuracy: Fraction | None
    macro_auc: Fraction | None
    ece: Fraction | None
