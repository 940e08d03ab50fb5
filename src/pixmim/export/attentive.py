"""Export an attentive probe as tensors and JSON, with Python code that needs torch and timm only."""

from pathlib import Path

from safetensors.torch import save

from pixmim.evaluation.attentive_probe import AttentiveProbe
from pixmim.utils.files import write_json, write_text_atomically

_CODE = """\
import json
import timm
import torch
from safetensors.torch import load_file

encoder = timm.create_model("local-dir:.", pretrained=True).eval()
probe = load_file("attentive.safetensors")
with open("attentive.json") as file:
    classes = json.load(file)["classes"]

@torch.no_grad()
def classify(images):  # normalized, (b c h w)
    x = encoder.forward_features(images){tokens}  # patch tokens (b n d)
    attention = (probe["queries"] @ x.transpose(1, 2) / x.shape[-1] ** 0.5).softmax(dim=-1)
    pooled = torch.einsum("bqd,qdv->bqv", attention @ x, probe["values"]).flatten(1)
    pooled = (pooled - probe["norm.running_mean"]) / (probe["norm.running_var"] + {eps}).sqrt()
    return pooled @ probe["head.weight"].T + probe["head.bias"]  # logits (b classes)"""


def write_probe(probe: AttentiveProbe, classes: list[str], folder: Path, *, is_map: bool) -> list[str]:
    """Write attentive.safetensors and attentive.json into the folder of an encoder exported to timm.

    Returns lines of Python that classify with them; `is_map` if the encoder returns a map (b h w d), as a Swin.
    """
    tensors = {name: value.contiguous() for name, value in probe.state_dict().items()}
    write_text_atomically(folder / "attentive.safetensors", save(tensors, {"format": "pt"}))
    write_json(folder / "attentive.json", {"classes": classes, "queries": len(probe.queries)})
    tokens = ".flatten(1, 2)" if is_map else "[:, encoder.num_prefix_tokens :]"
    return _CODE.format(tokens=tokens, eps=probe.norm.eps).splitlines()
