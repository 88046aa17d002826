"""What ``visattn generate`` and the library below it refuse: one sentence, and no file is left."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models import WanTransformer3DModel
from PIL import Image
from support.cli import GENERATE, SIZE, made, process, refused

from visattn.generation import Job, Loading, load_pipeline
from visattn.patterns import Diagonal
from visattn.plan import Denoiser, Plan, Rule

pytestmark = pytest.mark.usefixtures("folder")


def weights(name, part="transformer"):
    own = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return Path(name, part, f"{own}.safetensors")


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGED = ("cut", "cut-text", "gone", "short", "shape", "no-index", "no-json", "list", "who")


def damaged_models():
    """Copies of the model, each with one thing wrong."""
    for name in DAMAGED:
        shutil.copytree("wan", name)
    for path in (weights("cut"), weights("cut-text", "text_encoder")):
        path.write_bytes(path.read_bytes()[:1000])
    weights("gone").unlink()
    edit(Path("short/transformer/config.json"), '"num_layers": 3', '"num_layers": 4')
    edit(Path("shape/transformer/config.json"), '"ffn_dim": 64', '"ffn_dim": 32')
    Path("no-index/model_index.json").unlink()
    Path("no-json/model_index.json").write_text('{"_class_name": ')
    Path("list/model_index.json").write_text("[1]")
    edit(Path("who/model_index.json"), '"WanPipeline"', '"NoSuchPipeline"')


def plan_files():
    """Plans that are none, or are for something else."""
    good_plan = Plan((Rule(Diagonal(4)),)).to_json()
    Path("text.json").write_text("radial")
    Path("empty.json").write_text(" \n")
    Path("schema.json").write_text(good_plan.replace("visattn.plan/2", "visattn.plan/99"))
    Path("key.json").write_text(good_plan.replace('"evidence"', '"evidense"'))
    Path("pattern.json").write_text(good_plan.replace("Diagonal(width=4)", "Diagnal(width=4)"))
    Path("binary.json").write_bytes(bytes(range(256)))
    Path("list.json").write_text("[]")
    heads = Plan((Rule((Diagonal(4),) * 12),))
    Path("heads.json").write_text(heads.to_json())
    other = Plan(denoisers={"transformer": Denoiser("WanTransformer3DModel", 40, 40)})
    Path("other.json").write_text(other.to_json())
    layer = Plan((Rule(Diagonal(4), layer="blocks.7.attn1"),))
    Path("layer.json").write_text(layer.to_json())
    Path("no-plan").mkdir()


def other_files():
    Path("dir.mp4").mkdir()
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    Path("taken.mp4.json").write_text('{"mine": 1}')
    Path("text.png").write_text("hello")
    Image.new("RGB", (64, 96)).save("image.png")
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:50])
    Path("empty.jsonl").touch()
    Path("latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    Path("one.jsonl").write_text('{"prompt": "a", "promt": "b"}\n')
    Path("cut.jsonl").write_text('{"prompt": "a\n')
    Path("comma.jsonl").write_text('{"prompt": "a"},\n{"prompt": "b"},\n')
    Path("array.jsonl").write_text('[{"prompt": "a"}, {"prompt": "b"}]\n')
    Path("pretty.jsonl").write_text('{\n  "prompt": "a"\n}\n')
    Path("pretty-array.jsonl").write_text('[\n  {"prompt": "a"},\n]\n')
    Path("utf16.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16-le"))
    Path("fine.jsonl").write_text('{"prompt": "a"}\n')
    Path("empty-lora").mkdir()
    Path("text-lora").mkdir()
    Path("text-lora/pytorch_lora_weights.safetensors").write_text("hello")


def own(*argv):
    """The good command line with something wrong added."""
    return [*GENERATE, "-o", "new.mp4", *argv]


def model(name, *argv):
    return ["generate", "a red square", "--model", name, *SIZE, "-o", "new.mp4", *argv]


PLAIN = ["generate", "--model", "wan", *SIZE]
# argv, and words of the error; they need no model that loads
BAD = {
    "neither prompt nor prompts": (PLAIN, "either a prompt or --prompts"),
    "both": ([*GENERATE, "--prompts", "fine.jsonl", "-o", "new"], "either a prompt or --prompts"),
    "two prompts": (own("another"), "unrecognized arguments"),
    "unknown option": (own("--colour", "red"), "unrecognized arguments"),
    "shortened option": (own("--num-fr", "9"), "unrecognized arguments"),
    "empty model": (model(""), "model=''"),
    "missing model": (model("no-such"), "'no-such' is no folder"),
    "missing hub model": (model("user/no-such"), "cannot be loaded"),
    "path too deep": (model("a/b/c"), "is no folder"),
    "missing path": (model("./no-such"), "is no folder"),
    "model is a file": (model("text.json"), "is no folder"),
    "no index": (model("no-index"), "has no model_index.json"),
    "index no json": (model("no-json"), "cannot be loaded"),
    "index no object": (model("list"), "cannot be loaded"),
    "unknown pipeline": (model("who"), "NoSuchPipeline"),
    "truncated weights": (model("cut"), "cannot be loaded"),
    "truncated text encoder": (model("cut-text"), "cannot be loaded"),
    "missing weights": (model("gone"), "cannot be loaded"),
    "too few weights": (model("short"), "lacks weights"),
    "weights of another shape": (model("shape"), "cannot be loaded"),
    "no such variant": (own("--variant", "fp8"), "fp8"),
    "plan no json": (own("--plan", "text.json"), "is not JSON"),
    "empty plan": (own("--plan", "empty.json"), "is empty"),
    "plan no object": (own("--plan", "list.json"), "not a JSON object"),
    "binary plan": (own("--plan", "binary.json"), "no UTF-8"),
    "unknown schema": (own("--plan", "schema.json"), "visattn.plan/99"),
    "unknown key": (own("--plan", "key.json"), "evidense"),
    "unknown pattern in a plan": (own("--plan", "pattern.json"), "iagnal"),
    "unknown pattern": (own("--plan", "radiall(decay=1)"), "radiall"),
    "unknown parameter": (own("--plan", "radial(decoy=1)"), "decoy"),
    "parameter nan": (own("--plan", "radial(decay=nan)"), "nan"),
    "code": (own("--plan", "__import__('os').system('touch owned')"), "__import__"),
    "missing plan": (own("--plan", "no-such.json"), "no-such.json"),
    "folder without a plan": (own("--plan", "no-plan"), "no-plan"),
    "no plan beside the model": (own("--plan", "auto"), "plan='auto' found no"),
    "missing hub plan": (own("--plan", "user/no-such"), "user/no-such"),
    "plan for other heads": (own("--plan", "heads.json"), "12 heads"),
    "plan for another model": (own("--plan", "other.json"), "for another model"),
    "plan for other layers": (own("--plan", "layer.json"), "blocks.7.attn1"),
    "plan for another grid": (own("--plan", "diagonal(99999)"), "does not fit the grid"),
    "unknown backend": (own("--backend", "cuda"), "invalid choice"),
    "output in no folder": ([*GENERATE, "-o", "no/new.mp4"], "No such file"),
    "output in a file": ([*GENERATE, "-o", "text.json/new.mp4"], "Not a directory"),
    "wrong suffix": ([*GENERATE, "-o", "new.gif"], "must end in .mp4 or .png"),
    "png of several frames": ([*GENERATE, "-o", "new.png"], "can hold one frame only"),
    "output over a folder": ([*GENERATE, "-o", "dir.mp4"], "is a folder"),
    "output over a file": ([*GENERATE, "-o", "text.json/"], "must end in|is a file"),
    "folder with other files": ([*GENERATE, "-o", "full"], "notes.txt"),
    "record over another file": ([*GENERATE, "-o", "taken.mp4"], "taken.mp4.json"),
    "null byte": ([*GENERATE, "-o", "a\0.mp4"], "null"),
    "long name": ([*GENERATE, "-o", "a" * 300 + ".mp4"], "too long"),
    "negative frames": (own("--num-frames", "-9"), "num_frames=-9"),
    "no frames": (own("--num-frames", "0"), "num_frames=0"),
    "frames no number": (own("--num-frames", "many"), "invalid int value"),
    "no steps": (own("--num-inference-steps", "0"), "num_inference_steps=0"),
    "negative steps": (own("--num-inference-steps", "-5"), "num_inference_steps=-5"),
    "no height": (own("--height", "0"), "height=0"),
    "negative width": (own("--width", "-64"), "width=-64"),
    "odd height": (own("--height", "95"), "divisible"),
    "guidance nan": (own("--guidance-scale", "nan"), "guidance_scale=nan"),
    "guidance infinite": (own("--guidance-scale", "inf"), "guidance_scale=inf"),
    "negative seed": (own("--seed", "-1"), "seed=-1"),
    "huge seed": (own("--seed", str(2**64)), "below 2\\*\\*63"),
    "no fps": (own("--fps", "0"), "fps=0"),
    "fps nan": (own("--fps", "nan"), "fps=nan"),
    "no video": (own("--num-videos-per-prompt", "0"), "at least 1"),
    "unknown dtype": (own("--dtype", "int8"), "dtype='int8'"),
    "unknown device": (own("--device", "gpu"), "device='gpu'"),
    "device that is not there": (own("--device", "cuda:77"), "cuda:77.*not available"),
    "device of no use": (own("--device", "meta"), "not available"),
    "two devices": (own("--device", "cpu", "--device-map", "cpu"), "exclude each other"),
    "device map of parts": (own("--device-map", '{"vae": "cpu"}'), "--device-map"),
    "unknown offload": (own("--cpu-offload", "disk"), "cpu_offload='disk'"),
    "offload to itself": (own("--cpu-offload", "model", "--device", "cpu"), "needs an accelerator"),
    "balanced offload": (own("--cpu-offload", "model", "--device-map", "balanced"), "one device"),
    "unknown attention backend": (own("--attention-backend", "fast"), "attention_backend='fast'"),
    "compile no json": (own("--compile", "max"), "--compile 'max'"),
    "compile of no such option": (own("--compile", '{"speed": 9}'), "speed"),
    "missing image": (own("--image", "no-such.png"), "no-such.png"),
    "no image": (own("--image", "text.png"), "is no image"),
    "truncated image": (own("--image", "cut.png"), "cut.png"),
    "image for text alone": (own("--image", "image.png"), "WanPipeline takes no image"),
    "no image for image to video": (model("i2v"), "needs an image"),
    "true guidance of another model": (own("--true-cfg-scale", "2"), "takes no true_cfg_scale"),
    "negative prompt that is not looked at": (
        model("hunyuanvideo", "--negative-prompt", "blue"),
        "HunyuanVideoPipeline ignores negative_prompt at true_cfg_scale=1; give",
    ),
    **{
        f"negative prompt of {name} without guidance": (
            model(name, "--negative-prompt", "blue", "--guidance-scale", "1"),
            "Pipeline ignores negative_prompt at guidance_scale=1; .*NAG",
        )
        for name in ("wan", "wan22", "cogvideox")
    },
    "true guidance from nothing": (
        model("hunyuanvideo", "--true-cfg-scale", "2"),
        "ignores true_cfg_scale=2 without a negative_prompt; give a negative_prompt",
    ),
    "missing lora": (own("--lora", "./no-lora"), "no-lora"),
    "missing hub lora": (own("--lora", "user/no-such"), "user/no-such"),
    "empty lora": (own("--lora", "empty-lora"), "empty-lora"),
    "lora no weights": (own("--lora", "text-lora"), "text-lora"),
    "lora no json": (own("--lora", "{lora"), "no JSON"),
    "lora of no id": (own("--lora", '{"lora_scale": 1}'), "lacks the key 'lora_id'"),
    "lora of another key": (own("--lora", '{"lora_id": "a", "scale": 1}'), "unknown key 'scale'"),
    "lora scale nan": (own("--lora", '{"lora_id": "a", "lora_scale": NaN}'), "lora_scale=nan"),
    "lora of no such role": (
        own("--lora", '{"lora_id": "a", "role": "vae"}'),
        "role='vae' of a LoRA must be one of transformer, transformer_2",
    ),
    "lora of a denoiser that is not there": (
        own("--lora", '{"lora_id": "a", "role": "transformer_2"}'),
        "lora 'a' has role='transformer_2', but WanPipeline takes a LoRA for transformer$",
    ),
    "loras of one name": (
        own(*["--lora", '{"lora_id": "a", "adapter_name": "b"}'] * 2),
        "adapter_name='b' is used by two LoRAs",
    ),
    "second guidance scale of one denoiser": (own("--guidance-scale-2", "2"), "guidance_scale_2"),
    "missing prompts": ([*PLAIN, "--prompts", "no.jsonl", "-o", "new"], "no.jsonl"),
    "empty prompts": ([*PLAIN, "--prompts", "empty.jsonl", "-o", "new"], "is empty"),
    "prompts no text": ([*PLAIN, "--prompts", "latin.jsonl", "-o", "new"], "no UTF-8"),
    "prompts is a folder": ([*PLAIN, "--prompts", "full", "-o", "new"], "directory"),
    "prompts of one wrong key": ([*PLAIN, "--prompts", "one.jsonl", "-o", "new"], "'promt'"),
    "prompts of one cut line": ([*PLAIN, "--prompts", "cut.jsonl", "-o", "new"], "not JSON"),
    "prompts with a comma": (
        [*PLAIN, "--prompts", "comma.jsonl", "-o", "new"],
        "line 1: it ends in a comma; a line must be one JSON object$",
    ),
    **{
        f"prompts as {name}": (
            [*PLAIN, "--prompts", f"{name}.jsonl", "-o", "new"],
            "write one JSON object on each line",
        )
        for name in ("array", "pretty", "pretty-array")
    },
    "prompts of another encoding": (
        [*PLAIN, "--prompts", "utf16.jsonl", "-o", "new"],
        "holds the character NUL; save it as UTF-8",
    ),
    "bytes that are no UTF-8": (
        ["generate", "caf\udce9", "--model", "wan", *SIZE],
        r"prompt='caf\\udce9' contains '\\udce9', which is no Unicode character",
    ),
    "guidance no Unicode": (
        own("--guidance", "NAG('\udce9')"),
        r"contains '\\udce9', which is no Unicode character",
    ),
    "prompts to nowhere": ([*PLAIN, "--prompts", "fine.jsonl"], "needs --output"),
    "prompts to a file": ([*PLAIN, "--prompts", "fine.jsonl", "-o", "a.mp4"], "must be a folder"),
    "prompts to no folder": ([*PLAIN, "--prompts", "fine.jsonl", "-o", "no/new"], "does not exist"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_wrong_input_is_one_line_and_exit_code_2(argv, words, capsys):
    if not set(argv).isdisjoint(DAMAGED):
        damaged_models()
    plan_files()
    other_files()
    (line,) = refused(capsys, *argv)
    assert re.search(words, line), line


PROCESSES = {
    "triton without a gpu": (own("--backend", "triton"), "backend='triton' cannot run"),
    "plan for another grid": (own("--plan", "diagonal(99999)"), "does not fit the grid"),
    "missing model": (model("no-such"), "is no folder"),
    "output in no folder": ([*GENERATE, "-o", "no/new.mp4"], "No such file"),
}


@pytest.mark.sampled(4)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs where there is a GPU")
@pytest.mark.parametrize(("argv", "words"), PROCESSES.values(), ids=PROCESSES)
def test_wrong_input_of_a_real_process(argv, words):
    done = process(argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("visattn: error: [^\n]+\n", done.stderr), done.stderr
    assert words in done.stderr
    assert made() == []


BAD_JOBS = {
    "prompt": 3,
    "negative_prompt": ["a"],
    "image": 1.0,
    "height": 64.0,
    "width": True,
    "num_frames": "9",
    "num_inference_steps": [2],
    "seed": None,
    "guidance_scale": "high",
    "fps": "16",
}


@pytest.mark.parametrize(("name", "value"), BAD_JOBS.items())
def test_job_names_the_field_that_is_wrong(name, value):
    with pytest.raises(TypeError, match=f"^{name}="):
        Job(**{"prompt": "a", name: value})


def test_pickled_weights_are_not_opened():
    """A file of that kind runs code when it is read."""
    shutil.copytree("wan", "pickled")
    weights("pickled").unlink()
    own = WanTransformer3DModel.from_pretrained("wan", subfolder="transformer")
    torch.save(own.state_dict(), "pickled/transformer/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(Loading("pickled"))
