"""The methods that GIFT is compared with and that PEFT does not have; `gift.baselines.methods` names them all."""

from gift.tuner.registration import Method

BASELINES = (
    Method("VPT", "gift.baselines.vpt", "VptConfig", "VptModel"),
    Method("TOAST", "gift.baselines.toast", "ToastConfig", "ToastModel"),
    Method("BITFIT", "gift.baselines.bitfit", "BitFitConfig", "BitFitModel"),
)
