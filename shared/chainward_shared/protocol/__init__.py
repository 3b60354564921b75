"""The messages between coordinator and sites: typed records, to and from Flower's `RecordDict`.

Every message is one pydantic model, carried as JSON, and at most the arrays that its kind may carry. What isn't listed
in `ARRAYS` for a kind can't be packed, and is refused on arrival: no tensor of a privileged teacher has a name here.
"""

from chainward_shared.bounds import FEWEST_SITES
from chainward_shared.protocol.envelope import (
    MAX_BODY,
    PROTOCOL_VERSION,
    Body,
    Refusal,
    SiteRefusal,
    fingerprint,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.protocol.joining import (
    AtWork,
    AtWorkRequest,
    BaseState,
    BaseTask,
    CardRequest,
    Hello,
    HelloRequest,
    SimulatedSite,
    SiteCard,
    SitePrivacy,
)
from chainward_shared.protocol.run_plan import Approval, PlannedTask, RunPlan, RunPlanState, beyond
from chainward_shared.protocol.scoring import (
    EvaluateResult,
    EvaluateTask,
    SharedNoise,
    StatisticsResult,
    StatisticsTask,
)
from chainward_shared.protocol.summing import (
    MOST_WEIGHT,
    MaskedSum,
    Offer,
    Round,
    SumKeys,
    SumKeysTask,
    SumShares,
    SumSharesTask,
    SumTask,
    SumUnmasking,
    SumUnmaskTask,
    SumWork,
)
from chainward_shared.protocol.training import LinkResult, LinkTask, StudentResult, StudentTask
from chainward_shared.task import Split
from chainward_shared.training_log import TrainingLog

__all__ = [
    "FEWEST_SITES",
    "MAX_BODY",
    "MOST_WEIGHT",
    "PROTOCOL_VERSION",
    "Approval",
    "AtWork",
    "AtWorkRequest",
    "BaseState",
    "BaseTask",
    "Body",
    "CardRequest",
    "EvaluateResult",
    "EvaluateTask",
    "Hello",
    "HelloRequest",
    "LinkResult",
    "LinkTask",
    "MaskedSum",
    "Offer",
    "PlannedTask",
    "Refusal",
    "Round",
    "RunPlan",
    "RunPlanState",
    "SharedNoise",
    "SimulatedSite",
    "SiteCard",
    "SitePrivacy",
    "SiteRefusal",
    "Split",
    "StatisticsResult",
    "StatisticsTask",
    "StudentResult",
    "StudentTask",
    "SumKeys",
    "SumKeysTask",
    "SumShares",
    "SumSharesTask",
    "SumTask",
    "SumUnmaskTask",
    "SumUnmasking",
    "SumWork",
    "TrainingLog",
    "beyond",
    "fingerprint",
    "kind_of",
    "pack",
    "unpack",
]
