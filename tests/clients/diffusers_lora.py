"""diffusers: LoRA weights saved, loaded, weighted, scaled, fused, unfused, unloaded on a small pipeline."""

from .common import close, folder, tokenizer, torch

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # isort: skip
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[4, 8], norm_num_groups=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    text = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=16, eos_token_id=1, pad_token_id=0))
    words = tokenizer()
    words.model_max_length = 16
    parts = dict(text_encoder=text, tokenizer=words, safety_checker=None, feature_extractor=None)
    made = StableDiffusionPipeline(
        unet=unet, vae=vae, scheduler=DDIMScheduler(), **parts, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe, **settings):
    generator = torch.Generator().manual_seed(0)
    out = pipe("w1 w2", num_inference_steps=2, generator=generator, output_type="latent", **settings)
    return out.images


pipe = pipeline()
plain = image(pipe)
config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
text_config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
for seed, name in enumerate(("first", "second")):
    maker = pipeline()
    torch.manual_seed(seed)
    maker.unet.add_adapter(config)
    maker.text_encoder.add_adapter(text_config)
    StableDiffusionPipeline.save_lora_weights(
        str(folder() / name),
        unet_lora_layers=get_peft_model_state_dict(maker.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(maker.text_encoder),
    )
    pipe.load_lora_weights(str(folder() / name), adapter_name=name)
assert pipe.get_list_adapters() == {"unet": ["first", "second"], "text_encoder": ["first", "second"]}
seen = {}
for key, (names, weights) in {
    "first": (["first"], [1.0]),
    "second": (["second"], [1.0]),
    "both": (["first", "second"], [0.7, 0.4]),
    "off": (["first", "second"], [0.0, 0.0]),
}.items():
    pipe.set_adapters(names, weights)
    seen[key] = image(pipe)
assert close(seen["off"], plain) and not close(seen["first"], plain) and not close(seen["first"], seen["second"])
pipe.set_adapters(["first"], [1.0])
assert close(image(pipe, cross_attention_kwargs={"scale": 0.0}), plain)
assert close(image(pipe), seen["first"])

pipe.fuse_lora(adapter_names=["first"], lora_scale=1.0)
assert torch.allclose(image(pipe), seen["first"], atol=1e-4)
pipe.unfuse_lora()
pipe.set_adapters(["first", "second"], [0.7, 0.4])
assert torch.allclose(image(pipe), seen["both"], atol=1e-4)
pipe.disable_lora()
assert close(image(pipe), plain)
pipe.enable_lora()
pipe.delete_adapters("second")
assert pipe.get_active_adapters() == ["first"]
pipe.unload_lora_weights()
assert close(image(pipe), plain)
pipe.load_lora_weights(str(folder() / "second"), adapter_name="again")
pipe.set_adapters(["again"], [1.0])  # diffusers keeps the scale of an earlier call for the text encoder
assert close(image(pipe), seen["second"])

swapped = pipeline()
for seed, r in ((3, 4), (4, 2)):
    maker = pipeline()
    torch.manual_seed(seed)
    maker.unet.add_adapter(LoraConfig(r=r, lora_alpha=r, init_lora_weights=False, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(maker.unet)
    StableDiffusionPipeline.save_lora_weights(str(folder() / f"rank{r}"), unet_lora_layers=layers)
    seen[r] = image(maker)
swapped.enable_lora_hotswap(target_rank=4)
swapped.load_lora_weights(str(folder() / "rank4"), adapter_name="one")
held = [p for n, p in swapped.unet.named_parameters() if "lora_" in n]
assert held and torch.allclose(image(swapped), seen[4], atol=1e-4)
for r in (2, 4):
    swapped.load_lora_weights(str(folder() / f"rank{r}"), adapter_name="one", hotswap=True)
    assert torch.allclose(image(swapped), seen[r], atol=1e-4)
now = [p for n, p in swapped.unet.named_parameters() if "lora_" in n]
assert all(a is b for a, b in zip(held, now, strict=True))
print("done")
