"""What each part of an answer can tell about patients, in plain words: the column of ``chainward-site dry-run``."""

from __future__ import annotations

import re
from typing import Final

PRIVATE_WEIGHTS: Final = (
    "learnt with noise: how much it tells of one patient is bounded by the epsilon of the statement"
)
PLAIN_WEIGHTS: Final = (
    "learnt from the images without noise: an expert can find out whether a case was in training, and, with effort, "
    "sometimes parts of what it looks like"
)
_OF_POLICY = "a rule of the site's own policy"
_SPENT = "what private trainings were done here, and what they cost; no data"
_NAMES = "the request's own words, given back"
_LOSS = "how well the model fits the training cases on average over an epoch; one number, without noise"

_WEIGHTS = (r"link-result/model", r"student-result/student")

_TELLS: Final[tuple[tuple[str, str], ...]] = (
    (r"envelope/.*", "the program's version of the protocol, and the kind of the message; no data"),
    (
        r"refusal/reason",
        "why the site refused: names and numbers of the request and of the policy; causes in the data stay here",
    ),
    (
        r"base-state/(complete|received)",
        "how much is here of the pretrained weights that the run starts from, which all members know; no data",
    ),
    (r"refusal/(final|waiting)", "whether asking again is of use; no data"),
    (r"[^/]*/site", "the site's id, which all members know"),
    (r"hello/version", "the program's version"),
    (
        r"hello/(key|signature)",
        "by which the coordinator knows this site again: a public key, and a proof that the site has it",
    ),
    (r"hello/.*", "empty at a hospital: simulations use it"),
    (
        r"site-card/(task|classes|image_size|channels|synthetic|preparation.*)",
        "how the data are described; agreed among all hospitals",
    ),
    (
        r"site-card/train",
        "how many images are trained on, which is the site's weight in averages; with a policy, the patients (or images) that "
        "the site declares",
    ),
    (r"site-card/(val|test)", "how many images there are; withheld by a policy unless its metrics are exact"),
    (
        r"site-card/class_counts.*",
        "how many cases of each class the site has; withheld by a policy unless its metrics are exact",
    ),
    (
        r"site-card/notes.*",
        "what is odd about the data, in counts and names of columns and classes; withheld by a policy unless metrics are exact",
    ),
    (r"site-card/privacy\.(terms|required).*", _OF_POLICY),
    (r"site-card/privacy", "that the site has no policy"),
    (r"site-card/approval", "whether a person here approves every run; no data"),
    (r"site-card/encoder", "SHA-256 of the language encoder that reads reports here: of published files; no data"),
    (r"site-card/secure_sums", "whether sums leave in secure sums alone; no data"),
    (r"run-plan-state/(approval|plan)", "whether a person here has approved the run; no data"),
    (r"sum-keys/offer.*", "public keys for one secure sum, and their signature; no data"),
    (
        r"sum-shares/shares.*",
        "shares of secrets that were made for one secure sum, each readable by a partner alone; no data",
    ),
    (
        r"masked-sum/sum",
        "sums over the images, an update of the student or counts of predictions, with masks on them: noise, without what all "
        "the other hospitals send",
    ),
    (r"sum-unmasking/(seeds|keys).*", "shares of other hospitals' masks of one secure sum; no data"),
    (r"(masked-sum|statistics-result)/noise", "how much noise is on the sums of a private run; no data"),
    (
        r"statistics-result/(sums|images|validation)",
        "sums over the images, of embeddings and of their products, by class, and how many there are: of a class of one image "
        "that image's embedding, and a model made for it can have embeddings that show the image",
    ),
    (r"statistics-result/digest", "a checksum of the sums in this message"),
    (r"(link|student|statistics)-result/(hop|round)", _NAMES),
    (r"(link|student)-result/digest", "a checksum of the weights in this message"),
    (r"(link|student)-result/training\.(epochs|precision|temperature.*)", "how it was trained, as the request said"),
    (
        r"(link|student)-result/training\.(steps|images|unlabelled)",
        "follows from the number of training images; in private training from the declared number of patients",
    ),
    (
        r"(link|student)-result/training\.(loss|teacher_trust|attention|unlabelled_loss|privileged).*",
        f"{_LOSS}; empty in private training",
    ),
    (r"(link|student)-result/training\.seconds", "how fast the machine is, and roughly how many images there are"),
    (
        r"(link|student)-result/training\.privacy.*",
        "DP-SGD parameters of the private training: noise, steps, rate; no data",
    ),
    (r"(link|student)-result/training\.notes.*", "what the site switched off, by its policy"),
    (r"student-result/auxiliary_kept", "follows from the request: how far the teacher that stays here has moved"),
    (
        r"evaluate-result/scores.*",
        "how well the model does on the site's own images, and how many there are; noised or withheld by policy",
    ),
    (
        r"evaluate-result/localisation.*",
        "how well attention finds the regions of interest, in sums over the test images; only where scores are exact",
    ),
    (r"evaluate-result/release", _OF_POLICY),
    (
        r"evaluate-result/counts_.*",
        "counts of right and wrong answers by class and confidence: together with other knowledge they can tell of single cases; "
        "noised or withheld by policy",
    ),
    (r"[^/]*/statement\.(terms).*", _OF_POLICY),
    (r"[^/]*/statement\.(public_key|signature)", "proves that the statement is this site's; no data"),
    (
        r"(site-card/privacy|[^/]*/statement)\.head.*",
        "how many entries the ledger has, and a hash of the last: it can't be turned back",
    ),
    (
        r"[^/]*/statement\.(time|run|hop|site|seeded|schema)",
        "when, about which work, and that the noise was real; no data",
    ),
    (r"[^/]*/statement.*", _SPENT),
)

UNKNOWN: Final = "not described: look at it, and tell the makers of Chainward"


def what_it_tells(kind: str, path: str, *, private: bool) -> str:
    """Return what a part of an answer can tell.

    Parameters
    ----------
    kind : of the answer; "envelope" for what every message has
    path : of the field within the body, as in ``training.loss``, or the name of an array record
    private : whether the training was with differential privacy
    """
    place = f"{kind}/{path}"
    if any(re.fullmatch(pattern, place) for pattern in _WEIGHTS):
        return PRIVATE_WEIGHTS if private else PLAIN_WEIGHTS
    for pattern, words in _TELLS:
        if re.fullmatch(pattern, place):
            return words
    return UNKNOWN
