"""The messages between coordinator and sites: typed records, to and from Flower's `RecordDict`.

Every message is one pydantic model, carried as JSON, and at most the arrays that its kind may carry. What isn't listed
in `ARRAYS` for a kind can't be packed, and is refused on arrival: no tensor of a privileged teacher has a name here.
"""

from chainward_shared.bounds import FEWEST_SITES as FEWEST_SITES
from chainward_shared.protocol.envelope import PROTOCOL_VERSION as PROTOCOL_VERSION
from chainward_shared.protocol.envelope import Body as Body
from chainward_shared.protocol.envelope import Refusal as Refusal
from chainward_shared.protocol.envelope import SiteRefusal as SiteRefusal
from chainward_shared.protocol.envelope import fingerprint as fingerprint
from chainward_shared.protocol.envelope import kind_of as kind_of
from chainward_shared.protocol.envelope import pack as pack
from chainward_shared.protocol.envelope import unpack as unpack
from chainward_shared.protocol.joining import AtWork as AtWork
from chainward_shared.protocol.joining import AtWorkRequest as AtWorkRequest
from chainward_shared.protocol.joining import BaseState as BaseState
from chainward_shared.protocol.joining import BaseTask as BaseTask
from chainward_shared.protocol.joining import CardRequest as CardRequest
from chainward_shared.protocol.joining import Hello as Hello
from chainward_shared.protocol.joining import HelloRequest as HelloRequest
from chainward_shared.protocol.joining import SimulatedSite as SimulatedSite
from chainward_shared.protocol.joining import SiteCard as SiteCard
from chainward_shared.protocol.joining import SitePrivacy as SitePrivacy
from chainward_shared.protocol.run_plan import RunPlan as RunPlan
from chainward_shared.protocol.run_plan import RunPlanState as RunPlanState
from chainward_shared.protocol.scoring import EvaluateResult as EvaluateResult
from chainward_shared.protocol.scoring import EvaluateTask as EvaluateTask
from chainward_shared.protocol.scoring import SharedNoise as SharedNoise
from chainward_shared.protocol.scoring import StatisticsResult as StatisticsResult
from chainward_shared.protocol.scoring import StatisticsTask as StatisticsTask
from chainward_shared.protocol.summing import MOST_WEIGHT as MOST_WEIGHT
from chainward_shared.protocol.summing import MaskedSum as MaskedSum
from chainward_shared.protocol.summing import Offer as Offer
from chainward_shared.protocol.summing import Round as Round
from chainward_shared.protocol.summing import SumKeys as SumKeys
from chainward_shared.protocol.summing import SumKeysTask as SumKeysTask
from chainward_shared.protocol.summing import SumShares as SumShares
from chainward_shared.protocol.summing import SumSharesTask as SumSharesTask
from chainward_shared.protocol.summing import SumTask as SumTask
from chainward_shared.protocol.summing import SumUnmasking as SumUnmasking
from chainward_shared.protocol.summing import SumUnmaskTask as SumUnmaskTask
from chainward_shared.protocol.summing import SumWork as SumWork
from chainward_shared.protocol.training import LinkResult as LinkResult
from chainward_shared.protocol.training import LinkTask as LinkTask
from chainward_shared.protocol.training import StudentResult as StudentResult
from chainward_shared.protocol.training import StudentTask as StudentTask
from chainward_shared.task import Split as Split
from chainward_shared.training_log import TrainingLog as TrainingLog
