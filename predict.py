"""The service under Cog: its inputs, spelled out because Cog reads this file without running it."""

from cog import BasePredictor, Input, Path

from lightweight_engine.apps.predictor.start import start


class Predictor(BasePredictor):
    """Flux.1 as the service on Forge offered it."""

    def setup(self) -> None:
        self.flux = start()

    def healthcheck(self) -> bool:
        return self.flux.healthy()

    def predict(
        self,
        prompt: str = Input(description="What to draw."),
        width: int = Input(
            default=0,
            description="Width in pixels; 0 takes it from aspect_ratio, or from the picture's aspect.",
            ge=0,
            le=1280,
        ),
        height: int = Input(
            default=0,
            description="Height in pixels; 0 takes it from aspect_ratio, or from the picture's aspect.",
            ge=0,
            le=1280,
        ),
        num_outputs: int = Input(default=1, description="How many pictures, with seeds seed, seed+1, …", ge=1, le=4),
        sampler: str = Input(
            default="Euler",
            description="Sampler. A scheduler in its name counts where scheduler is Simple.",
            choices=[
                "Euler",
                "DEIS",
                "Euler a",
                "DPM++ 2M",
                "DPM++ SDE",
                "DPM++ 2M SDE",
                "DPM++ 2M SDE Karras",
                "DPM++ 2M SDE Exponential",
                "DPM++ 3M SDE",
                "DPM++ 3M SDE Karras",
                "DPM++ 3M SDE Exponential",
                "[Forge] Flux Realistic",
            ],
        ),
        scheduler: str = Input(
            default="Simple",
            description="Noise schedule. Turbo, Align Your Steps and SGM Karras or Exponential are not for Flux.",
            choices=[
                "Simple",
                "Karras",
                "Exponential",
                "SGM Uniform",
                "SGM Karras",
                "SGM Exponential",
                "KL Optimal",
                "Normal",
                "DDIM",
                "Beta",
                "Turbo",
                "Align Your Steps",
                "Align Your Steps 11",
                "Align Your Steps 32",
                "Align Your Steps GITS",
            ],
        ),
        num_inference_steps: int = Input(default=8, description="Sampling steps.", ge=1, le=200),
        guidance_scale: float = Input(default=1.0, description="True guidance; 1 is off.", ge=1, le=50),
        distilled_guidance_scale: float = Input(
            default=3.5, description="Distilled guidance, the main one of Flux dev.", ge=0, le=30
        ),
        seed: int = Input(default=-1, description="Seed of the first picture; -1 draws one."),
        enable_hr: bool = Input(default=True, description="Enlarge and refine the picture; not with image."),
        hr_upscaler: str = Input(
            default="4x-UltraSharp",
            description="Upscaler of the hires pass.",
            choices=[
                "Latent",
                "Latent (antialiased)",
                "Latent (bicubic)",
                "Latent (bicubic antialiased)",
                "Latent (nearest)",
                "Latent (nearest-exact)",
                "None",
                "Lanczos",
                "Nearest",
                "ESRGAN_4x",
                "4x-UltraSharp",
                "LDSR",
                "R-ESRGAN 4x+",
                "R-ESRGAN 4x+ Anime6B",
                "ScuNET GAN",
                "ScuNET PSNR",
                "SwinIR 4x",
            ],
        ),
        hr_steps: int = Input(
            default=8, description="Steps of the hires pass; 0 repeats num_inference_steps.", ge=0, le=100
        ),
        hr_scale: float = Input(default=1.3, description="Scale of the hires pass.", ge=1, le=4),
        denoising_strength: float = Input(
            default=0.3, description="How much of the schedule the hires pass runs.", ge=0, le=1
        ),
        debug_flux_checkpoint_url: str = Input(
            default="", description="Use this checkpoint instead: URL of a .safetensors file."
        ),
        enable_clip_l: bool = Input(
            default=False, description="Take CLIP-L from its own file even where the checkpoint holds one."
        ),
        enable_t5xxl_fp16: bool = Input(
            default=False, description="Take T5 from its own file even where the checkpoint holds one."
        ),
        enable_ae: bool = Input(
            default=False, description="Take the autoencoder from its own file even where the checkpoint holds one."
        ),
        force_model_reload: bool = Input(default=False, description="Load the model from scratch."),
        forge_unet_storage_dtype: str = Input(
            default="Automatic (fp16 LoRA)",
            description="How the transformer's weights are kept; Automatic, as configured.",
            choices=[
                "Automatic",
                "Automatic (fp16 LoRA)",
                "FP16",
                "FP16 (fp16 LoRA)",
                "FP32",
                "FP32 (fp16 LoRA)",
                "bnb-nf4",
                "bnb-nf4 (fp16 LoRA)",
                "bnb-fp4",
                "bnb-fp4 (fp16 LoRA)",
                "float8-e4m3fn",
                "float8-e4m3fn (fp16 LoRA)",
                "float8-e5m2",
                "float8-e5m2 (fp16 LoRA)",
            ],
        ),
        image: str = Input(default="", description="Start from this picture: a data URL, base64 or a URL."),
        prompt_strength: float = Input(
            default=0.8, description="How much of the schedule image-to-image runs.", ge=0, le=1
        ),
        aspect_ratio: str = Input(
            default="9:16",
            description="Shape of the picture where width or height is 0.",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"],
        ),
        output_format: str = Input(
            default="webp", description="File format of the pictures.", choices=["webp", "jpg", "png"]
        ),
        lora_urls: list[str] = Input(default=[], description="Addresses of LoRA files to apply."),
        lora_scales: list[float] = Input(
            default=[1], description="One strength for each of lora_urls; [1] stands for all."
        ),
        ad_prompt: str = Input(default="", description="Prompt of the pass for faces; blank, the prompt."),
        ad_hands_prompt: str = Input(default="", description="Prompt of the pass for hands; blank, the prompt."),
        postback_url: str = Input(default="", description="POST progress with a preview here about once a second."),
        adetailer: bool = Input(default=False, description="Paint faces and hands anew, larger."),
        adetailer_args: str = Input(
            default="{}", description="JSON object of ad_… arguments over the defaults of the pass for faces."
        ),
        adetailer_args_hands: str = Input(
            default="{}", description="JSON object of ad_… arguments over the defaults of the pass for hands."
        ),
    ) -> list[Path]:
        inputs = {name: value for name, value in locals().items() if name != "self"}
        return [Path(path) for path in self.flux.predict(inputs)]
