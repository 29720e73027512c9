"""The data sets that ``servelab data`` knows: where their publishers have them, and their hashes.

Hashes are of the files in the publishers' repositories. Where the file itself was not at hand, it is the name
of its Git object in the repository (SHA-1 of the file behind a header), which is what Git itself checks.
"""

from __future__ import annotations

from dataclasses import dataclass

_AZURE = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data/AzureLLMInferenceTrace_"
_WEEK = (
    "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace/AzureLLMInferenceTrace_"
)
_BURST = "https://github.com/HPMLL/BurstGPT/releases/download/v1.2/BurstGPT_"
_MOON = (
    "https://raw.githubusercontent.com/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/"
    "FAST25-release/traces/"
)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One file."""

    name: str
    """What ``data fetch`` and ``workload.path`` call it."""
    what: str
    """One line."""
    publisher: str
    licence: str
    url: str
    size: str
    """For people."""
    workload: str
    """Which workload reads it."""
    suffix: str = ".csv"
    sha256: str | None = None
    git_blob: str | None = None
    """Name of the Git object, where there is no ``sha256``."""


CATALOG = {
    one.name: one
    for one in (
        DataSet(
            name="azure_code",
            what="Azure code completion, one hour of 2023: 8,819 requests",
            publisher="Microsoft Azure (AzurePublicDataset)",
            licence="CC-BY-4.0",
            url=f"{_AZURE}code.csv",
            size="320 kB",
            workload="azure",
            sha256="54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        ),
        DataSet(
            name="azure_conv",
            what="Azure conversation, one hour of 2023: 19,366 requests",
            publisher="Microsoft Azure (AzurePublicDataset)",
            licence="CC-BY-4.0",
            url=f"{_AZURE}conv.csv",
            size="719 kB",
            workload="azure",
            sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        ),
        DataSet(
            name="azure_2024_code",
            what="Azure code completion, nine days of 2024: 16.8 million requests",
            publisher="Microsoft Azure (AzurePublicDataset)",
            licence="CC-BY-4.0",
            url=f"{_WEEK}code_1week.csv",
            size="about 0.8 GB",
            workload="azure",
        ),
        DataSet(
            name="azure_2024_conv",
            what="Azure conversation, nine days of 2024: 27.3 million requests",
            publisher="Microsoft Azure (AzurePublicDataset)",
            licence="CC-BY-4.0",
            url=f"{_WEEK}conv_1week.csv",
            size="about 1.2 GB",
            workload="azure",
        ),
        DataSet(
            name="burstgpt_1",
            what="BurstGPT, first two months: 1.43 million requests",
            publisher="HPMLL (BurstGPT)",
            licence="CC-BY-4.0",
            url="https://raw.githubusercontent.com/HPMLL/BurstGPT/e92f533b6c85ea7f4164fb3d97d1aa2c3edacbc8/"
            "data/BurstGPT_1.csv",
            size="52 MB",
            workload="burstgpt",
            git_blob="f95dd2c84454b067fdd0973858c55ecfe31bdad7",
        ),
        DataSet(
            name="burstgpt_2",
            what="BurstGPT, second two months: 3.86 million requests",
            publisher="HPMLL (BurstGPT)",
            licence="CC-BY-4.0",
            url=f"{_BURST}2.csv",
            size="about 145 MB",
            workload="burstgpt",
        ),
        DataSet(
            name="burstgpt_3",
            what="BurstGPT, another 110 days, with sessions: 5.34 million requests",
            publisher="HPMLL (BurstGPT)",
            licence="CC-BY-4.0",
            url=f"{_BURST}3.csv",
            size="about 220 MB",
            workload="burstgpt",
        ),
        DataSet(
            name="mooncake_conversation",
            what="Mooncake conversations, one hour: 12,031 requests with block hashes",
            publisher="Moonshot AI, Tsinghua (kvcache-ai/Mooncake)",
            licence="Apache-2.0",
            url=f"{_MOON}conversation_trace.jsonl",
            size="3.0 MB",
            workload="mooncake",
            suffix=".jsonl",
            sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        ),
        DataSet(
            name="mooncake_synthetic",
            what="Mooncake synthetic mix of public data sets: 3,993 requests with block hashes",
            publisher="Moonshot AI, Tsinghua (kvcache-ai/Mooncake)",
            licence="Apache-2.0",
            url=f"{_MOON}synthetic_trace.jsonl",
            size="1.1 MB",
            workload="mooncake",
            suffix=".jsonl",
            sha256="bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
        ),
        DataSet(
            name="mooncake_toolagent",
            what="Mooncake tools and agents, one hour: 23,608 requests with block hashes",
            publisher="Moonshot AI, Tsinghua (kvcache-ai/Mooncake)",
            licence="Apache-2.0",
            url=f"{_MOON}toolagent_trace.jsonl",
            size="about 5 MB",
            workload="mooncake",
            suffix=".jsonl",
            git_blob="b765599d1e0828b37f68d481563c385d3c11de54",
        ),
    )
}
"""By name."""
