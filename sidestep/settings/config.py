"""Every setting of every command, declared once: flags, questions, preset keys and docs/reference.md derive from it."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sidestep.errors import UserError
from sidestep.settings.option import (
    LARGEST_SEED,
    Answers,
    as_arguments,
    changed_from_defaults,
    fixed,
    option,
    options_of,
    resolve,
    same_as,
)
from sidestep.settings.path_checks import export_for, models_offered, run_for, states_offered, tensors_for
from sidestep.words import side_step

ADAPTER_TYPES = ("lora", "lokr", "dora", "loha", "oft")
OPTIMIZER_TYPES = ("adamw", "adamw8bit", "adafactor", "prodigy")
SCHEDULER_TYPES = ("cosine", "cosine_restarts", "linear", "constant", "constant_with_warmup", "warmup_stable_decay")
NORMALIZATIONS = ("none", "peak", "lufs")
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
RANK_MAP = "rank_map.json"  # what `estimate` leaves beside the data
SET_BY_RANK_MAP = (
    *("rank", "target_modules", "attention_type", "self_target_modules", "cross_target_modules", "target_mlp"),
)


def twice_the_rank(answers: Answers) -> float | None:
    """The alpha that suits an answered rank: the ratio that the defaults have."""
    return 2.0 * answers["rank"] if "rank" in answers else None


def rate_of_prodigy(answers: Answers) -> float | None:
    """The learning rate of prodigy: it finds its own, and multiplies it by this."""
    return 1.0 if answers.get("optimizer_type") == "prodigy" else None


def its_default(_answers: Answers) -> None:
    """What a setting goes back to where others are given that it would overrule or contradict."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which base model, where, and in which numbers: shared by every command that touches a model."""

    checkpoint_dir: Path = option(
        MISSING,
        "folder of the ACE-Step checkpoints (holds acestep-v15-turbo/, vae/, …), or ComfyUI's single .safetensors file",
        group="Model",
        label="Folder of the checkpoints",
        holds="checkpoints",
        kept=True,
        plain="where the ACE-Step models are: the folder with acestep-v15-turbo/, vae/ and others, or ComfyUI's file",
        more=(
            "These are ACE-Step's own models, which an adapter is made for and plays with. Nothing in the "
            "folder is changed. Where it is and how to get it stands on the page about installing "
            "(docs/install.md)."
        ),
    )
    model_variant: str = option(
        "turbo",
        "turbo, base, sft, xl-turbo, xl-base, xl-sft, or a folder name below --checkpoint-dir",
        group="Model",
        label="Model",
        plain="which of the downloaded models to use; turbo is the fast one",
        depends_on=("checkpoint_dir",),
        offers=models_offered,
        kept=True,
        more=(
            "Take the one that you will play with: an adapter of one sounds different on another. Turbo "
            "makes a song in 8 steps and is what most people use; base and sft take many steps and follow "
            "guidance; xl needs a card of 12 GB or more."
        ),
    )
    device: str = option(
        "auto",
        "auto, cuda, cuda:N, mps, xpu or cpu",
        group="Model",
        plain="what computes; auto takes the fastest that this computer has",
        more=(
            "auto is right unless there are several graphics cards: cuda:1 is the second. On cpu everything "
            "works and takes many times as long. The sound is the same on all of them, but for the last "
            "digits."
        ),
    )
    precision: str = option(
        "auto",
        "numbers the frozen base computes in",
        group="Model",
        choices=("auto", "bf16", "fp16", "fp32"),
        plain="how exactly the model's numbers are kept; auto takes what suits the device",
        more=(
            "bf16 is usual on cards of the last years, fp32 on a processor. Half precision takes half of "
            "the memory and is not heard. The adapter itself always learns in fp32."
        ),
    )
    attention: str = option(
        "auto",
        "how the sliding-window layers attend; all kinds give the same result",
        group="Speed",
        choices=("auto", "sdpa", "local", "flash"),
        plain="how the model looks at the moments near by: auto takes the fastest; it is not heard",
        more=(
            "All of them give the same music, but for the last digits. Leave it at auto; another one is for "
            "finding out whether a fault lies there."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ModelConfig):
    """`preprocess`: audio into training tensors."""

    audio_dir: Path | None = option(
        None,
        "folder of songs to preprocess",
        group="Preprocessing",
        label="Folder of songs",
        holds="songs",
        kept=True,
        plain="the folder with your songs; its subfolders are searched too",
        more=(
            "Captions and lyrics are read from text files beside the songs. A list made by List songs holds "
            "the same and can be edited in one place."
        ),
    )
    dataset_json: Path | None = option(
        None,
        "dataset.json that lists the songs and what is known of them",
        group="Preprocessing",
        label="List of songs",
        plain="the list that List songs made of your songs",
        holds="dataset.json",
        kept=True,
        more=(
            "The list names each song with its caption, lyrics, tempo and key. What you changed in it is "
            "what training reads. Without a list the text files beside the songs are taken."
        ),
    )
    tensor_output: Path = option(
        MISSING,
        "folder that receives the training tensors",
        group="Preprocessing",
        label="Folder for the training tensors",
        plain="where the prepared songs go; made once, used by every training",
        depends_on=("songs", "audio_dir", "dataset_json"),
        suggest=tensors_for,
        holds="new folder",
        more=(
            "A song takes a few megabytes there. Training reads this folder and not your music, so it must "
            "stay as long as you train. Songs that are in it already are not made again."
        ),
    )
    normalize: str = option(
        "none",
        "bring songs to one level: peak (-1 dBFS) or lufs (-14 LUFS, never clipping)",
        group="Preprocessing",
        choices=NORMALIZATIONS,
        plain="make loud and quiet songs equally loud: peak goes by their peaks, lufs by how loud they sound",
        notes=("as they are", "by their loudest moment", "by how loud they sound"),
        more=(
            "Songs of one album are even already: none. A collection from many sources gains from lufs. "
            "Nothing is clipped."
        ),
    )
    max_duration: float = option(
        0.0,
        "use only the first N seconds of a song; 0 uses all of it",
        group="Preprocessing",
        minimum=0,
        plain="use only the first so many seconds of each song; 0 uses whole songs",
        more=(
            "0 is usual: endings and bridges are worth hearing. A limit of 240 keeps single long songs from "
            "setting the memory that all need."
        ),
    )
    regimes: tuple[str, ...] = option(
        ("text2music",),
        "conditions to store: text2music, and hints for the app's thinking mode",
        group="Preprocessing",
        choices=("text2music", "hints"),
        advanced=True,
        plain="what is kept of each song: what is needed to train by caption, or for thinking mode too",
        more=(
            "text2music is enough for playing by caption and lyrics. hints also keeps the sketch that the "
            "app's thinking mode gives the model, so that training can use it. The songs take more room "
            "then."
        ),
    )

    def __post_init__(self) -> None:
        if not self.audio_dir and not self.dataset_json:
            raise UserError(
                "preprocess needs songs: neither --audio-dir nor --dataset-json is given.",
                "Add --audio-dir FOLDER_OF_SONGS, or build a list first: "
                + side_step("build-dataset", "--input", "FOLDER_OF_SONGS"),
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """`fixed`: train an adapter."""

    dataset_dir: Path = option(
        MISSING,
        "folder of preprocessed .pt tensors",
        group="Data",
        label="Folder of training tensors",
        plain="your songs as Preprocess has written them",
        holds="tensors",
        kept=True,
        more=(
            "Every song that Preprocess has put there is learned. It must have been made for the same "
            "model: turbo's songs are refused for base."
        ),
    )
    output_dir: Path = option(
        MISSING,
        "folder for adapters, training state and logs",
        group="Data",
        label="Folder for the results",
        plain="where the adapter, its saved states and the report go",
        depends_on=("dataset_dir",),
        suggest=run_for,
        holds="new run",
        more=(
            "One folder for each training. The adapter to play is in final/ in it, the best moment in "
            "best/, and report.html shows how it went. Nothing of another training is written over."
        ),
    )
    run_name: str = option(
        "",
        "name of the run in TensorBoard and the report; default: the output folder's name",
        group="Data",
        advanced=True,
        plain="what the run is called in its report; empty: as its folder",
        more="It is only a name, and changes nothing in the sound. The folder's name is usual.",
    )
    chunk_duration: float = option(
        0.0,
        "train on random windows of N seconds; 0 trains on whole songs",
        group="Data",
        minimum=0,
        plain="learn from excerpts of so many seconds: less memory and time; 0 hears whole songs",
        more=(
            "Whole songs teach how a piece is built, from the first verse to the end. Excerpts of 30 to 60 "
            "seconds teach sound and playing, in a fraction of the time, and are cut elsewhere in every "
            "round."
        ),
    )
    hints_ratio: float = option(
        0.0,
        "share of micro-steps trained as in the app's thinking mode (needs --regimes hints)",
        group="Data",
        minimum=0,
        maximum=1,
        advanced=True,
        plain="how often it learns with the sketch of the song beside the caption, as in thinking mode",
        more=(
            "0 is usual. If you play with the app's thinking mode, 0.5 lets it learn both ways. The songs "
            "must have been prepared with hints."
        ),
    )
    val_split: float = option(
        0.0,
        "share of the songs that is kept apart for validation",
        group="Data",
        minimum=0,
        maximum=0.5,
        plain="a share of the songs to test on instead of learning from, such as 0.1: shows when it starts to copy",
        more=(
            "With 0.1 and twenty songs two are kept apart. When their loss rises while that of the others "
            "falls, it has begun to copy; best/ holds the moment before. With fewer than ten songs leave it "
            "at 0."
        ),
    )

    caption_dropout: float = option(
        0.0,
        "share of visits whose caption is the trigger word alone (nothing where there is none)",
        group="Data",
        minimum=0,
        maximum=1,
        plain="how often a song is described by your trigger word alone; 0.1 ties the style to that word",
        advanced=True,
        more=(
            "The word then brings the style even where the caption says little else. 0.05 to 0.2 is usual "
            "where it is used; too much of it, and captions steer less. Without a trigger word the caption "
            "is simply left out."
        ),
    )
    tag_dropout: float = option(
        0.0,
        "share of visits whose caption is without the trigger word",
        group="Data",
        minimum=0,
        maximum=1,
        plain="how often the trigger word is left out, so that the style also comes without it",
        advanced=True,
        more=(
            "At 0 the style hangs on the trigger word and can be left off by not writing it. At 0.1 it also "
            "comes a little without the word."
        ),
    )
    metadata_dropout: float = option(
        0.0,
        "share of visits in which one of tempo, time signature and key is N/A",
        group="Data",
        minimum=0,
        maximum=1,
        plain="how often one of tempo, time signature and key is not told, so that the style does not hang on them",
        advanced=True,
        more=(
            "At 0 the model may take 120 beats for a part of your style, if all songs have them. 0.1 to 0.3 "
            "loosens that. It costs no time."
        ),
    )
    prior_data: Path | None = option(
        None,
        "folder of tensors of other music, on which the adapter is to leave the model as it is",
        group="Data",
        label="Folder of tensors of other music",
        plain="other music, prepared like your songs, on which the adapter learns to change nothing; empty: none",
        holds="tensors",
        advanced=True,
        more=(
            "It keeps the adapter from changing music that is not yours, such as other styles at the same "
            "strength. A few dozen songs of many styles are where to begin. Each step takes longer by their share."
        ),
    )
    prior_weight: float = option(
        0.2,
        "share of --prior-data in each optimizer step and its loss",
        group="Data",
        minimum=0.01,
        maximum=0.9,
        plain="how much of each step goes to the other music: 0.2 is a fifth; more keeps more and learns less",
        advanced=True,
        more=(
            "0.2 is where to begin. With 0.5 half of the time goes into keeping what the model could "
            "already. Judge shows what it brought, as less drift."
        ),
    )

    adapter_type: str = option(
        "lora",
        "kind of adapter",
        group="Adapter",
        choices=ADAPTER_TYPES,
        label="Kind of adapter",
        plain="lora is what most programs read; the others are smaller or learn otherwise",
        notes=(
            "the usual one; most programs read it",
            "the smallest files; gentle",
            "like lora, more stable at low ranks; slower",
            "more reach at the same rank",
            "turns what is there; keeps the model's sound",
        ),
        more=(
            "LoRA is the safe choice. LoKr makes files of a few megabytes and changes less, which suits a "
            "voice or an instrument. On a small model, over five seeds (docs/benchmarks.md): DoRA took more time "
            "than LoRA and learnt next to nothing more, OFT and LoHa learnt less, LoKr least in the smallest file. "
            "Which program reads which kind is on the page about other programs (docs/interop.md)."
        ),
    )
    rank: int = option(
        64,
        "LoRA rank, LoKr linear dimension",
        "--rank",
        "-r",
        group="Adapter",
        minimum=1,
        maximum=4096,  # the widest layer of any model
        kept=True,
        plain="how much it can learn: 16 small, 64 usual, 128 a large file and more memory",
        more=(
            "A low rank takes the colour of your music: instruments, room, voice. A high one also takes "
            "details, and copies songs sooner. Most people train LoRAs of rank 16 to 64; for fewer than ten "
            "songs stay low. For LoKr the number is a dimension of another kind: leave it at 64."
        ),
    )
    alpha: float = option(
        128.0,
        "adapter scale is alpha / rank",
        group="Adapter",
        above=0,
        depends_on=("rank",),
        suggest=twice_the_rank,
        kept=True,
        plain="its strength while it learns: leave it at twice the rank",
        more=(
            "What counts is alpha divided by rank: 2 is usual here, 1 in many other tools. Half of it acts "
            "much like half the learning rate."
        ),
    )
    dropout: float = option(
        0.1,
        "dropout inside the adapter",
        group="Adapter",
        minimum=0,
        maximum=0.95,
        plain=(
            "how much of the adapter is left out at random in each step, so that it learns the style and not the songs"
        ),
        more=("0.1 is usual. With very few songs 0.2 copies later; with hundreds of songs 0 learns a little faster."),
    )
    init_from: Path | None = option(
        None,
        "adapter (file or folder, of any program) to start from instead of from nothing",
        group="Adapter",
        advanced=True,
        plain="go on from an adapter that is there already, of any program",
        holds="adapter",
        more=(
            "Good for adding songs to an adapter that you like. To go on with a stopped training take "
            "Resume instead, which also keeps the learning rate's course."
        ),
    )
    target_modules: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "attention projections that get an adapter",
        group="Adapter",
        choices=("q_proj", "k_proj", "v_proj", "o_proj"),
        plain="which parts of the model's listening it may change; all four is usual",
        more=(
            "q and k decide what is listened to, v and o what is made of it. All four is usual. Fewer make "
            "a smaller file that changes less."
        ),
    )
    attention_type: str = option(
        "both",
        "adapt self attention, cross attention or both",
        group="Adapter",
        choices=("both", "self", "cross"),
        notes=("music and words", "how moments of the music relate", "how caption and lyrics act"),
        plain="what it may change: how moments of the music relate, how caption and lyrics act, or both",
        more=(
            "both is usual. self alone takes sound and playing, and leaves what words do. cross alone "
            "changes how captions and lyrics act, and hardly the sound."
        ),
    )
    self_target_modules: tuple[str, ...] | None = option(
        None,
        "projections of self attention, where they differ from --target-modules",
        group="Adapter",
        choices=("q_proj", "k_proj", "v_proj", "o_proj"),
        depends_on=("target_modules",),
        suggest=its_default,
        advanced=True,
        plain="parts that may change in how moments of the music relate, where other than above",
        more=(
            "Empty is usual: the same as for captions. Name some to let the adapter change one side more "
            "than the other."
        ),
    )
    cross_target_modules: tuple[str, ...] | None = option(
        None,
        "projections of cross attention, where they differ from --target-modules",
        group="Adapter",
        choices=("q_proj", "k_proj", "v_proj", "o_proj"),
        depends_on=("target_modules",),
        suggest=its_default,
        advanced=True,
        plain="parts that may change in how caption and lyrics act, where other than above",
        more=(
            "Empty is usual: the same as for the music. Name some to let the adapter change one side more "
            "than the other."
        ),
    )
    target_mlp: bool = option(
        False,
        "adapt the MLP too",
        group="Adapter",
        plain="let the adapter reach more of the model: learns more, and is larger",
        more=(
            "The file becomes about twice as large, and training slower. Of two adapters of the same size the one "
            "with these parts learned more where it was measured (docs/benchmarks.md); most adapters do without."
        ),
    )
    ignore_rank_map: bool = option(
        False,
        "do not use the rank map that estimate left in --dataset-dir",
        group="Adapter",
        plain="learn with the same rank everywhere, although ranks were measured for these songs",
        more=(
            "Measured ranks put what the adapter can learn where your music needs it. Yes compares how it "
            "sounds without them."
        ),
    )
    init: str = option(
        "default",
        "start of lora_A: default (random), or gradient (the directions that estimate measured)",
        group="Adapter",
        choices=("default", "gradient"),
        plain="how it begins: from chance, or in the directions that Measure ranks has found",
        more=(
            "default is usual. gradient learned a little more in the same time where it was measured "
            "(docs/benchmarks.md), and needs a measurement of these songs. Both begin with the sound of the "
            "model alone."
        ),
    )
    lokr_factor: int = option(
        -1,
        "LoKr: factor of the Kronecker split; -1 takes the most square one",
        group="Adapter",
        minimum=-1,
        advanced=True,
        when=("adapter_type", "lokr"),
        plain="LoKr: how the file is divided; -1 makes the smallest",
        more="-1 is usual. A small factor such as 4 makes a larger file that can learn more.",
    )
    lokr_decompose_both: bool = option(
        False,
        "LoKr: low rank on both factors",
        group="Adapter",
        advanced=True,
        when=("adapter_type", "lokr"),
        plain="LoKr: an even smaller file that learns less",
        more="No is usual. Yes keeps both halves at a low rank, for voices or instruments that need little.",
    )
    lokr_weight_decompose: bool = option(
        False,
        "LoKr: learn magnitude and direction apart (DoRA)",
        group="Adapter",
        advanced=True,
        when=("adapter_type", "lokr"),
        plain="LoKr: learn strength and direction apart, as DoRA does",
        more="No is usual. Yes is slower, and fewer programs read it. What it gains was not measured here.",
    )

    epochs: int = option(
        100,
        "passes over the data",
        group="Training",
        minimum=1,
        kept=True,
        plain="how often every song is heard: 100 is usual, too often copies them",
        more=(
            "Ten songs are learnt after some fifty to two hundred rounds; with a hundred songs a third of "
            "that is enough. Saved states on the way let you go back to an earlier one, so rather too many "
            "than too few."
        ),
    )
    max_steps: int = option(
        0,
        "stop after N optimizer steps; 0 trains all epochs",
        group="Training",
        minimum=0,
        plain="stop after so many steps, wherever the epochs are; 0 goes by the epochs",
        more=(
            "0 is usual. A number serves for comparing settings with the same amount of learning. The "
            "learning rate fades towards that end."
        ),
    )
    batch_size: int = option(
        1,
        "songs or windows in a micro-step",
        group="Training",
        minimum=1,
        maximum=1024,
        plain="how many songs are learnt from at the same moment; more takes more memory",
        more="1 is usual on cards up to 16 GB. Gradient accumulation gives the same evenness without the memory.",
    )
    gradient_accumulation: int = option(
        4,
        "micro-steps in an optimizer step",
        group="Training",
        minimum=1,
        plain="how many songs are heard before the adapter is changed: more is steadier, and fewer changes a round",
        more="4 is usual. With fewer than ten songs 1 or 2 learns more in the same time.",
    )
    seed: int = option(
        42,
        "seed of everything random",
        group="Training",
        minimum=0,
        maximum=LARGEST_SEED,
        plain="a run with the same seed and settings gives the same adapter",
        more=(
            "Another number draws other excerpts and another order, and gives a slightly different adapter. "
            "It is no knob for quality: 42 is as good as any."
        ),
    )
    lr: float = option(
        1e-4,
        "learning rate",
        group="Training",
        above=0,
        label="Learning rate",
        depends_on=("optimizer_type",),
        suggest=rate_of_prodigy,
        plain="how far each step goes: 0.0001 is usual; more is faster and can break the sound",
        more=(
            "If the result crackles or all songs sound alike, halve it. If nothing can be heard after many "
            "rounds, double it. Prodigy finds it by itself; leave it at 1 there."
        ),
    )
    optimizer_type: str = option(
        "adamw",
        "optimizer",
        group="Training",
        choices=OPTIMIZER_TYPES,
        plain="adamw is usual, adamw8bit takes less memory, prodigy finds the learning rate itself",
        notes=(
            "the usual one",
            "the same with less memory",
            "little memory, slow start",
            "finds the learning rate itself",
        ),
        more=(
            "All of them reach much the same sound. adamw is what most people use. prodigy frees you from "
            "choosing a learning rate, and takes more memory for the adapter."
        ),
    )
    scheduler_type: str = option(
        "cosine",
        "learning rate over time",
        group="Training",
        choices=SCHEDULER_TYPES,
        plain="how the learning rate changes during the run; cosine lets it fade to the end",
        more=(
            "cosine and linear end gently, which keeps the last epochs from copying. constant is for "
            "trainings that you stop by ear. cosine is usual."
        ),
    )
    warmup_steps: int = option(
        100,
        "optimizer steps of warm-up, at most a tenth of the run",
        group="Training",
        minimum=0,
        plain="begin with a small learning rate for so many steps",
        more=(
            "A slow start keeps the first steps from spoiling what the model can. 100 is usual; short runs "
            "take at most a tenth of their steps for it."
        ),
    )
    weight_decay: float = option(
        0.01,
        "weight decay",
        group="Training",
        minimum=0,
        plain="pulls the adapter gently back to nothing, so that it does not overdo; 0.01 is usual",
        more=(
            "Higher values make an adapter that changes less. 0 switches it off. It is heard less than "
            "rank, epochs and learning rate."
        ),
    )
    max_grad_norm: float = option(
        1.0,
        "clip the gradient to this norm; 0 does not clip",
        group="Training",
        minimum=0,
        plain="a limit for single wild steps; 1 is usual",
        more=(
            "A song that is unlike all others can pull hard for one step; this holds the pull down. 0 sets "
            "no limit. There is seldom a reason to change it."
        ),
    )
    ema_decay: float = option(
        0.0,
        "keep a running average of the adapter beside it, written to ema/; 0 keeps none, 0.99 is usual",
        group="Training",
        minimum=0,
        maximum=0.99999,
        plain="also keep a smoothed average of the adapter; 0.99 is usual, 0 keeps none",
        more=(
            "The average is calmer than the last step. It is written beside the adapter, in ema/, to "
            "compare by ear. It costs no time and some memory."
        ),
    )
    early_stop_patience: int = option(
        0,
        "stop after N epochs (or validations) without a new best; 0 never does",
        group="Training",
        minimum=0,
        plain="stop by itself after so many epochs without getting better; 0 never does",
        more=("It needs something to judge by: best with a share of the songs kept apart. 10 to 20 rounds are usual."),
    )

    loss_weighting: str = option(
        "none",
        "weight of a timestep in the loss",
        group="Flow matching",
        choices=("none", "min_snr"),
        plain="which stages of making a song count more; none is as the model itself was taught",
        more=(
            "none is usual. min_snr holds back the stages in which nearly nothing is left to do, so that "
            "more is learned of form and less of the finest sound."
        ),
    )
    snr_gamma: float = option(
        5.0,
        "gamma of min_snr",
        group="Flow matching",
        above=0,
        advanced=True,
        when=("loss_weighting", "min_snr"),
        plain="how much min_snr holds back: lower holds back more; 5 is usual",
        more="It does nothing without min_snr. 5 is the value of the paper; 1 holds back much.",
    )
    timestep_mode: str = option(
        "auto",
        "discrete (turbo's 8 steps) or logit-normal; auto asks the checkpoint",
        group="Flow matching",
        choices=("auto", "discrete", "logit-normal"),
        depends_on=("checkpoint_dir", "model_variant"),
        label="How the model makes music",
        plain="in 8 fast steps without guidance, as turbo (discrete), or in many steps, as base and sft (logit-normal)",
        advanced=True,
        more=(
            "It must be as the model was made: turbo and its merges discrete, base and sft logit-normal. "
            "auto knows it of ACE-Step's own models. With the wrong one nothing sounds right."
        ),
    )
    timestep_shift: float | None = option(
        None,
        "shift of turbo's eight timesteps towards noise; default: the checkpoint's, by its config and name",
        group="Flow matching",
        above=0,
        maximum=100,
        advanced=True,
        when=("timestep_mode", "auto", "discrete"),
        plain="how long a song stays vague before details come; empty: as the model was made",
        more=(
            "Empty is right, unless you play with another shift in the app. Then take the same here. 3 is turbo's own."
        ),
    )
    timestep_mu: float | None = option(
        None,
        "mean of the logit-normal law; default: the checkpoint's",
        group="Flow matching",
        advanced=True,
        when=("timestep_mode", "auto", "logit-normal"),
        plain="which stages of making a song are learned most; empty: as the model was taught",
        more=("Empty is right for ACE-Step's own models. Higher values learn more of form, lower ones more of detail."),
    )
    timestep_sigma: float | None = option(
        None,
        "spread of the logit-normal law; default: the checkpoint's",
        group="Flow matching",
        above=0,
        advanced=True,
        when=("timestep_mode", "auto", "logit-normal"),
        plain="how widely the stages are spread; empty: as the model was taught",
        more=("Empty is right for ACE-Step's own models. Small values learn one stage well and the others hardly."),
    )
    cfg_ratio: float | None = option(
        None,
        "share of samples without condition; default: 0.15, off for turbo",
        group="Flow matching",
        minimum=0,
        maximum=1,
        label="CFG dropout",
        plain="how often the caption is hidden, so that guidance works later; turbo: leave empty",
        more=(
            "Base and sft need about 0.15, or guidance loses its grip. Turbo has its guidance built in and "
            "was never trained without captions."
        ),
    )

    compile: str = option(
        "off",
        "compile the model's layers: the first steps take minutes, the others less time",
        group="Speed",
        choices=("off", "on", "auto"),
        notes=("", "also where the flag has no value", "where the steps that are left gain more than compiling takes"),
        bare="on",
        plain="a slow start, then faster steps: for long runs",
        more=(
            "The sound is the same. The first steps take minutes, each later one less time, so that hours "
            "of training gain and a short one loses. auto compares the two."
        ),
    )

    gradient_checkpointing: bool = option(
        True,
        "recompute layers in the backward pass: less memory, about a third more time",
        group="Memory",
        plain="much less memory for about a third more time",
        more=(
            "The adapter is the same either way. Leave it on, unless the card has memory to spare: without "
            "it training is faster by about a quarter."
        ),
    )
    recompute_layers: int | None = option(
        None,
        "recompute only the first N layers; default: all of them",
        group="Memory",
        minimum=0,
        advanced=True,
        plain="how many layers save memory so; fewer are faster; empty: all",
        more=(
            "It is not heard. Each layer that is not recomputed makes steps faster and takes more of the "
            "card's memory. Memory, in the menu, says what fits."
        ),
    )
    recompute_as_needed: bool = option(
        False,
        "recompute only as many layers as the GPU's memory needs: as fast as fits",
        group="Memory",
        advanced=True,
        depends_on=("gradient_checkpointing", "recompute_layers", "swap_blocks"),
        suggest=its_default,
        plain="save only as much memory as your card needs, and be as fast as it can",
        more=(
            "It is not heard. The number of layers is chosen from the memory that is free at the start. "
            "Close other programs first, then it is faster."
        ),
    )
    base_precision: str = option(
        "auto",
        "frozen base in 8 or 4 bits (bitsandbytes); auto keeps --precision",
        group="Memory",
        choices=("auto", "int8", "nf4"),
        plain="store the model smaller to save memory: int8 halves it, nf4 quarters it",
        notes=("as it is", "half the memory, next to no loss", "a quarter of the memory, a little rougher"),
        more=(
            "The adapter learns in full precision all the same. int8 is next to never heard; nf4 is a "
            "little rougher, and lets a large model into a small card. Play with the usual model afterwards."
        ),
    )
    offload_activations: bool = option(
        False,
        "activations wait on the CPU for the backward pass",
        group="Memory",
        advanced=True,
        plain="much less memory on the card, more time: results in between wait in the computer's memory",
        more=(
            "It is not heard. It needs free memory of the computer instead, often several GB. Try it before "
            "smaller excerpts or a lower rank."
        ),
    )
    even_if_it_does_not_fit: bool = option(
        False,
        "train although the memory planner says that the GPU is too small",
        group="Memory",
        advanced=True,
        plain="start although the memory of the card will not be enough, as far as is known",
        more=(
            "The plan is within a few percent of what was measured. If memory runs out, nothing that was "
            "saved is lost. It is better to take one of the settings that the plan names."
        ),
    )
    swap_blocks: int = option(
        0,
        "keep the weights of the first N layers on the CPU and stream them in",
        group="Memory",
        minimum=0,
        advanced=True,
        plain="the least memory on the card, much more time: so many layers wait in the computer's memory",
        more=(
            "It is not heard. 0 is usual; raise it only if nothing else fits. With all layers waiting, a "
            "step takes several times as long."
        ),
    )
    offload_encoder: bool = option(
        False,
        "VAE and text encoder live on the CPU between uses",
        group="Memory",
        plain="less memory on the card; previews and preparing take longer",
        more=(
            "It is not heard. What reads captions and what makes sound out of numbers leave the card while "
            "they are not needed. Yes suits small cards."
        ),
    )

    score: bool = option(
        False,
        "judge all checkpoints at the end, as the command `score` does",
        group="Previews",
        plain="say at the end which checkpoint to take, and why: takes some minutes",
        more=(
            "It measures how much of your songs each saved state has learned, and how much else it has "
            "changed. Judge in the menu does the same afterwards. It is no ear: listen to what it names."
        ),
    )
    preview_every: int = option(
        0,
        "epochs between previews, audio with and without the adapter; "
        "0 makes them only at the end, if there is a prompt",
        group="Previews",
        minimum=0,
        plain="make music to listen to while training, every so many epochs; 0 only at the end",
        more=(
            "Each preview takes some seconds to minutes. Every 10 rounds is usual; it is the surest way to "
            "hear when to stop."
        ),
    )
    preview_prompt: str = option(
        "",
        "caption to listen to; default with --preview-every: those of the first two songs",
        group="Previews",
        plain="what that music should sound like; empty: as the first two songs",
        more=(
            "Write it as you will write captions later, with your trigger word. Something that is none of "
            "your songs shows best whether the style was learned or the songs."
        ),
    )
    preview_lyrics: str = option(
        "[Instrumental]",
        "lyrics of --preview-prompt; \\n begins a new line",
        group="Previews",
        plain=r"the words that are sung in it, or [Instrumental]; \n begins a new line",
        more="Two verses are enough for half a minute. Words show best whether a voice was learned.",
    )
    preview_prompts: Path | None = option(
        None,
        "JSON file with a list of prompts to listen to, instead of --preview-prompt",
        group="Previews",
        plain="a file with several descriptions to listen to, in place of a single one",
        holds="prompts",
        more=(
            "Each of them is played every time, so the wait grows with their number. Three is usual: near "
            "to your songs, far from them, and without the trigger word."
        ),
    )
    preview_duration: float = option(
        30.0,
        "seconds of each preview",
        group="Previews",
        minimum=1,
        maximum=600,
        plain="how many seconds each piece lasts that you hear meanwhile",
        more=("30 seconds show sound and playing. A whole form needs 120 or more, and takes as much longer to make."),
    )
    preview_seed: int = option(
        42,
        "seed of the previews' noise",
        group="Previews",
        minimum=0,
        maximum=LARGEST_SEED,
        plain="the same number makes the same piece each time, so that only the learning is heard",
        more="Leave it as it is within a training. Another number is another piece.",
    )
    preview_variant: tuple[str, ...] = option(
        (),
        "models that play the previews, such as turbo, or base turbo for both; default: the one that is trained",
        group="Previews",
        label="Models that play the previews",
        plain="hear the adapter on another model, such as turbo; several are heard one after the other",
        more=(
            "Adapters trained on base are mostly played on turbo, where they sound different. The other model must "
            "be of the same size. It comes into memory when the trained one has left, so each preview takes longer."
        ),
    )
    preview_think: bool = option(
        False,
        "the language model composes each preview, once and before the training; the DiT follows it in all of them",
        group="Previews",
        plain="previews as the app makes them with thinking on: the composer writes them first",
        more=(
            "The sketch is composed once, before the training, so that all previews follow the same one. It "
            "needs the language model among the checkpoints. Without it previews are made from the caption "
            "alone."
        ),
    )
    preview_adapter: Path | None = option(
        None,
        "adapter of train-lm, for the language model that composes the previews",
        group="Previews",
        label="Adapter of the composer in previews",
        plain="the composer's own adapter: the final/ or best/ folder of a run of train-lm",
        holds="adapter",
        when=("preview_think", True),
        kept=True,
        more=("Empty takes the composer as it is. With it you hear both adapters together, as they will be played."),
    )

    save_every: int = option(
        10,
        "epochs between checkpoints",
        group="Saving",
        minimum=1,
        plain="every so many epochs, keep a state to listen to or to go on from",
        more=(
            "10 is usual. Less often saves room on the disk, more often gives more moments to choose from. "
            "The adapter of each can be played and judged."
        ),
    )
    resume_from: Path | None = option(
        None,
        "checkpoint folder to go on from, or 'latest'",
        group="Saving",
        label="Go on from",
        plain="which saved state to go on from",
        depends_on=("run",),
        offers=states_offered,
        holds="saved state",
        more=(
            "The newest is usual. An earlier one goes back to before it began to copy. The run goes on "
            "exactly as it would have."
        ),
    )
    save_best: bool = option(
        True,
        "keep the adapter with the lowest validation loss (without --val-split: smoothed training loss) in best/",
        group="Saving",
        plain="also keep the adapter of the moment that was best, in best/",
        more=(
            "With a share of the songs kept apart it is the moment before it begins to copy. Without one it "
            "is the lowest loss of training, which says less. Yes is usual."
        ),
    )
    save_best_after: int = option(
        0,
        "look for the best only after N epochs",
        group="Saving",
        minimum=0,
        plain="do not look for the best moment before so many epochs",
        more=(
            "0 is usual. A number keeps the first epochs from being taken where the loss of the songs kept "
            "apart is shaky."
        ),
    )
    mark_drop: float = option(
        0.0,
        "also keep the adapter, with a preview, whenever the smoothed training loss has dropped by another such share "
        "of its first value; 0.05 is usual, 0 keeps none",
        group="Saving",
        minimum=0,
        maximum=0.5,
        label="Marks on the way",
        plain="also keep the adapter each time it has become clearly better by so much; 0.05 is usual, 0 keeps none",
        more=(
            "You hear where it begins to sound right, and where it goes too far. The first mark comes after six "
            "rounds at the earliest; where chance alone moves the loss more, the steps are wider."
        ),
    )
    validate_every: int = option(
        1,
        "epochs between validations",
        group="Saving",
        minimum=1,
        advanced=True,
        plain="how often the songs kept apart are listened to, in epochs",
        more="1 is usual. With many songs kept apart, 5 saves time and may miss the best moment by a little.",
    )
    keep_checkpoints: int = option(
        10,
        "newest checkpoints to keep; 0 keeps all",
        group="Saving",
        minimum=0,
        advanced=True,
        plain="how many saved states stay on the disk, the newest; 0 keeps all",
        more=(
            "Each takes about three times the size of the adapter. Judge compares those that are there. 10 is usual."
        ),
    )
    log_every: int = option(
        10,
        "optimizer steps between log lines",
        group="Saving",
        minimum=1,
        plain="after how many steps a line goes into the curves",
        more="It changes nothing that is learned. 10 is usual; 1 shows every step of a short training.",
    )

    def __post_init__(self) -> None:
        others = {
            "--no-gradient-checkpointing": not self.gradient_checkpointing,
            "--recompute-layers": self.recompute_layers is not None,
            "--swap-blocks": self.swap_blocks > 0,
        }
        if self.recompute_as_needed and (given := [flag for flag, is_given in others.items() if is_given]):
            raise UserError(
                f"--recompute-as-needed and {given[0]} are both given.",
                "Leave one of them away: both decide which layers are recomputed.",
            )

    @property
    def makes_previews(self) -> bool:
        """Whether a run makes previews without being asked by a key."""
        return bool(self.preview_every or self.preview_prompt or self.preview_prompts)


@dataclass(frozen=True, kw_only=True)
class TrainLmConfig(TrainConfig):
    """`train-lm`: train an adapter for the language model, which composes. What it has not, is fixed below."""

    lm: str = option(
        "auto",
        "language model: 0.6B, 1.7B, 4B, a folder's name or path; auto takes 1.7B where it is there",
        group="Model",
        plain="which language model; auto takes the one that the app has",
        more=(
            "An adapter of one size does not fit another, so take the one that you play with. 1.7B is the "
            "app's usual one; 4B needs more memory, 0.6B less."
        ),
    )
    rank: int = same_as(TrainConfig, "rank", default=16, kept=False)
    alpha: float = same_as(TrainConfig, "alpha", default=32.0, kept=False)
    dropout: float = same_as(TrainConfig, "dropout", default=0.05)
    epochs: int = same_as(TrainConfig, "epochs", default=20, kept=False)
    val_split: float = same_as(TrainConfig, "val_split", default=0.1)
    early_stop_patience: int = same_as(TrainConfig, "early_stop_patience", default=3)
    target_mlp: bool = same_as(TrainConfig, "target_mlp", default=True)
    preview_every: int = same_as(
        TrainConfig,
        "preview_every",
        help="epochs between previews: what the composer writes, and the DiT plays, with and without the adapter; "
        "0 makes them only at the end, if there is a prompt",
        plain="let the composer write a song while training, every so many epochs; 0 only at the end",
    )
    preview_adapter: Path | None = same_as(
        TrainConfig,
        "preview_adapter",
        help="adapter for the DiT that plays the previews",
        label="Adapter of the DiT in previews",
        plain="the band's own adapter: the final/ or best/ folder of a run of fixed",
        more="Empty takes the band as it is. With it you hear both adapters together, as they will be played.",
        when=(),
    )

    adapter_type: str = fixed("lora")
    batch_size: int = fixed(1)
    chunk_duration: float = fixed(0.0)
    hints_ratio: float = fixed(0.0)
    attention_type: str = fixed("self")
    self_target_modules: tuple[str, ...] | None = fixed(None)
    cross_target_modules: tuple[str, ...] | None = fixed(None)
    prior_data: Path | None = fixed(None)
    prior_weight: float = fixed(0.2)
    caption_dropout: float = fixed(0.0)
    tag_dropout: float = fixed(0.0)
    metadata_dropout: float = fixed(0.0)
    ignore_rank_map: bool = fixed(True)
    init: str = fixed("default")
    init_from: Path | None = fixed(None)
    lokr_factor: int = fixed(-1)
    lokr_decompose_both: bool = fixed(False)
    lokr_weight_decompose: bool = fixed(False)
    loss_weighting: str = fixed("none")
    snr_gamma: float = fixed(5.0)
    timestep_mode: str = fixed("auto")
    timestep_shift: float | None = fixed(None)
    timestep_mu: float | None = fixed(None)
    timestep_sigma: float | None = fixed(None)
    cfg_ratio: float | None = fixed(None)
    attention: str = fixed("auto")
    compile: str = fixed("off")
    recompute_layers: int | None = fixed(None)
    recompute_as_needed: bool = fixed(False)
    offload_activations: bool = fixed(False)
    offload_encoder: bool = fixed(False)
    swap_blocks: int = fixed(0)
    score: bool = fixed(False)
    preview_variant: tuple[str, ...] = fixed(())
    preview_think: bool = fixed(True)


@dataclass(frozen=True, kw_only=True)
class BuildDatasetConfig:
    """`build-dataset`: index a folder of audio and text."""

    input: Path = option(
        MISSING,
        "folder of songs, searched with its subfolders",
        group="Dataset",
        label="Folder of songs",
        plain="the folder with your songs; its subfolders are searched too",
        holds="songs",
        kept=True,
        more=(
            "Wav, flac, mp3, ogg, opus and m4a are read, among others. Text beside a song, such as "
            "song.caption.txt and song.lyrics.txt, is taken for it. Your files are not changed."
        ),
    )
    output: Path | None = option(
        None,
        "where to write; default: dataset.json in --input",
        group="Dataset",
        plain="where the list goes; empty: dataset.json among the songs",
        more="Empty is usual. Name another file where the songs lie on a disk that you may not write to.",
    )
    name: str | None = option(
        None,
        "name of the dataset; default: the folder's name",
        group="Dataset",
        plain="what the collection is called; empty: as its folder",
        more="It is only a name in the list. The folder's name is usual.",
    )
    tag: str | None = option(
        None,
        "trigger word that every prompt gets",
        group="Dataset",
        label="Trigger word",
        plain="a word of your own that goes into every caption and calls the style up later; empty: none",
        more=(
            "Take a word that means nothing, such as mrnglght: an ordinary one already means something to the "
            "model. It stands before every caption; write it into your prompts, and the style comes."
        ),
    )
    tag_position: str | None = option(
        None,
        "where the tag goes; default: prepend",
        group="Dataset",
        choices=("prepend", "append", "replace"),
        plain="where the trigger word stands in a caption: before it, after it, or in its place",
        more=(
            "In front is usual, and strongest. replace ties the whole style to the word and lets captions steer less."
        ),
    )
    genre_ratio: int | None = option(
        None,
        "percentage of a song's visits in which training tells its genre instead of a caption; default: 0",
        group="Dataset",
        minimum=0,
        maximum=100,
        plain="in how many of a hundred visits only the genre is told; empty: never",
        more=(
            "It teaches the style also for short prompts. 10 to 30 is usual where it is used. It needs "
            "songs that say their genre."
        ),
    )
    analyze: bool = option(
        False,
        "estimate missing tempo, key and time signature from the audio",
        group="Dataset",
        plain="work out tempo, key and time signature from the audio where they are not known",
        more=(
            "What you or the tags say stays. Tempo is right for most music with drums; key is wrong more "
            "often. It takes a few seconds a song."
        ),
    )
    audit: bool = option(
        False,
        "listen to every song: report length, level, clipping, duplicates, text that is missing, long or alike",
        group="Dataset",
        plain="listen to every song for what harms training: clipping, silence, doubles, missing text",
        more=(
            "It writes a page that shows each song with what deserves a look. One badly recorded song is "
            "heard in everything, so that it pays. It takes a few seconds a song."
        ),
    )
    caption: str = option(
        "none",
        "describe songs that have no caption: lm (ACE-Step's language model) or endpoint (a server, see --endpoint)",
        group="Describe",
        choices=("none", "lm", "endpoint"),
        plain="let a model listen to the songs and describe those that have no caption; lm runs on this computer",
        more=(
            "lm is ACE-Step's own language model and stays on this computer. endpoint sends the music to a "
            "server that you name. Read what it writes: your own words are better."
        ),
    )
    lyrics: str = option(
        "none",
        "lm: also take lyrics from --caption's model, which invents some of them; they are marked",
        group="Describe",
        choices=("none", "lm"),
        plain="also let the model write down the lyrics; it often invents them",
        when=("caption", "lm", "endpoint"),
        more=(
            "What it wrote is marked in the list. Correct it against the song: words that are not sung "
            "teach the voice nonsense. none takes songs without lyrics as instrumental."
        ),
    )
    lm: str = option(
        "auto",
        "language model: 0.6B, 1.7B, 4B, a folder's name or path; auto takes 1.7B where it is there",
        group="Describe",
        advanced=True,
        when=("caption", "lm"),
        plain="which language model listens; auto takes the app's usual one",
        more="1.7B is usual. 4B needs more memory and time, 0.6B less of both.",
    )
    model_variant: str = same_as(
        ModelConfig, "model_variant", group="Describe", when=("caption", "lm"), depends_on=(), offers=None, kept=False
    )
    device: str = same_as(ModelConfig, "device", group="Describe", advanced=True, when=("caption", "lm"))
    precision: str = same_as(ModelConfig, "precision", group="Describe", advanced=True, when=("caption", "lm"))
    base_precision: str = same_as(
        TrainConfig,
        "base_precision",
        group="Describe",
        advanced=True,
        when=("caption", "lm"),
        plain="read the language model smaller to save memory: int8 halves it, nf4 quarters it",
        more="auto is best. int8 comes next, then nf4: take the first that fits into the card.",
    )
    endpoint: str = option(
        "",
        "URL of a server that speaks OpenAI's chat format with audio; its key is read from SIDE_STEP_API_KEY",
        group="Describe",
        when=("caption", "endpoint"),
        plain="the address of a server that listens in place of this computer",
        more=(
            "Your music is sent there. It must speak OpenAI's chat format with audio; its key is read from "
            "SIDE_STEP_API_KEY."
        ),
    )
    endpoint_model: str = option(
        "",
        "name of the server's model",
        "--model",
        group="Describe",
        when=("caption", "endpoint"),
        plain="which of the server's models listens",
        more="The server's own page lists their names. Only models that hear audio can do it.",
    )
    endpoint_timeout: float = option(
        120.0,
        "seconds to wait for an answer of the server",
        group="Describe",
        above=0,
        advanced=True,
        when=("caption", "endpoint"),
        plain="how many seconds to wait for each song's answer",
        more=("120 is usual. A song whose answer does not come is named at the end, and the same command asks again."),
    )
    checkpoint_dir: Path | None = option(
        None,
        "ACE-Step checkpoints: for --caption lm, and for --audit, which then counts with their tokenizer",
        group="Dataset",
        plain="where the ACE-Step models are: the folder with acestep-v15-turbo/, vae/ and others",
        advanced=True,
        label="Folder of the checkpoints",
        holds="checkpoints",
        kept=True,
        more=(
            "Needed where the language model describes your songs. With it the page of the audit also "
            "counts how much of a caption the model can read."
        ),
    )
    overwrite: bool = option(
        False,
        "replace an existing dataset.json, edits included",
        group="Dataset",
        plain="write the list anew, and lose what was changed in it by hand",
        more="No keeps your edits and stops. Take Yes after captions or songs have changed on the disk.",
    )

    def __post_init__(self) -> None:
        if self.caption == "none" and self.lyrics != "none":
            raise UserError(f"--lyrics {self.lyrics} needs a model that listens.", "Add --caption lm.")
        if self.caption == "lm" and self.checkpoint_dir is None:
            raise UserError(
                "--caption lm needs the folder of the ACE-Step checkpoints.", "Add --checkpoint-dir CHECKPOINTS."
            )
        if self.caption == "endpoint" and not (self.endpoint and self.endpoint_model):
            raise UserError(
                "--caption endpoint needs a server and the name of its model.",
                "Add --endpoint http://localhost:8000/v1 --model NAME.",
            )


FOCUS_RANGES = {"balanced": (0.0, 1.0), "texture": (0.0, 0.4), "structure": (0.6, 1.0)}


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(ModelConfig):
    """`estimate`: Preprocessing++, which modules respond to this music and what rank each deserves."""

    dataset_dir: Path = same_as(TrainConfig, "dataset_dir")
    chunk_duration: float = option(
        0.0,
        "measure on windows of N seconds; 0 measures on whole songs",
        group="Data",
        minimum=0,
        plain="measure on excerpts of so many seconds; 0 hears whole songs",
        more="Take what you will train with. Excerpts need less memory and time.",
    )
    output: Path | None = option(
        None,
        "where to write; default: rank_map.json in --dataset-dir, where `fixed` finds it",
        group="Data",
        plain="where the measured ranks go; empty: among the songs, where Train finds them",
        more="Empty is usual. Name another file to compare two measurements.",
    )
    overwrite: bool = option(
        False,
        "replace a rank map that is already there",
        group="Data",
        plain="measure again, in place of what was measured before",
        more="Needed after songs were added or changed. The old measurement is gone then.",
    )

    rank: int = option(
        64,
        "the budget is what this rank costs on all attention projections",
        "--rank",
        "-r",
        group="Ranks",
        minimum=1,
        maximum=4096,
        plain="how much the adapter can learn on average; the measurement moves it to where it is worth most",
        kept=True,
        more=(
            "64 makes a file as large as an adapter of rank 64 without a measurement. Parts of the model "
            "that your music needs get up to twice that, others as little as 8."
        ),
    )
    alpha: float = option(
        128.0,
        "adapter scale is alpha / rank, the same in all modules",
        group="Ranks",
        above=0,
        depends_on=("rank",),
        suggest=twice_the_rank,
        kept=True,
        plain="its strength while it learns, the same everywhere: leave it at twice the rank",
        more="What counts is alpha divided by rank: 2 is usual here. Training takes it from the measurement.",
    )
    rank_min: int = option(
        8,
        "a module gets at least this rank; 0 lets the budget leave modules out",
        group="Ranks",
        minimum=0,
        kept=True,
        plain="no part of the model gets less than this; 0 leaves parts out",
        more=("8 is usual. 0 puts everything where it is worth most, and leaves the rest of the model as it was."),
    )
    rank_max: int = option(
        128,
        "a module gets at most this rank",
        group="Ranks",
        minimum=1,
        kept=True,
        plain="no part of the model gets more than this",
        more=(
            "Twice the usual rank is usual: 128. A higher limit lets single parts take nearly all, which "
            "copies songs sooner."
        ),
    )
    budget: int | None = option(
        None,
        "parameters to spend; default: those of --rank everywhere",
        group="Ranks",
        minimum=1,
        plain="how many numbers the adapter holds in all; empty: as many as at that rank everywhere",
        more="Empty is usual. A number makes files of one size, whatever kind of adapter.",
    )
    include_mlp: bool = option(
        True,
        "let the MLP compete for the budget too",
        group="Ranks",
        plain="let all of the model take part, not only its listening",
        more=("Yes is usual: the measurement finds out whether it is worth it. The file stays as large as before."),
    )
    focus: str = option(
        "balanced",
        "balanced, texture (t below 0.4), structure (t above 0.6), or the timesteps LOW,HIGH",
        group="Ranks",
        plain="what matters most: everything, texture (sound and playing) or structure (form and rhythm)",
        more=(
            "balanced is usual. texture suits a voice or an instrument, structure a way of composing. It "
            "moves ranks, and training still hears everything."
        ),
    )

    batches: str = option(
        "auto",
        "measure at least N batches; auto stops when two halves of the songs agree",
        group="Measuring",
        plain="how much music is listened to at least; auto stops when more changes nothing",
        more="auto is usual, and takes a few minutes. A number makes it longer or shorter.",
    )
    batch_size: int = option(
        1,
        "songs or windows in a batch",
        group="Measuring",
        minimum=1,
        maximum=1024,
        plain="how many songs are listened to at once",
        more="1 is usual. More is a little faster, and takes more memory. The result is much the same.",
    )
    seed: int = option(
        42,
        "seed of everything random",
        group="Measuring",
        minimum=0,
        maximum=LARGEST_SEED,
        plain="the same number measures the same again",
        more=("Another number draws other excerpts. If the ranks then differ much, there is too little music to tell."),
    )
    timestep_mode: str = same_as(TrainConfig, "timestep_mode", group="Measuring")
    timestep_shift: float | None = same_as(TrainConfig, "timestep_shift", group="Measuring")
    sketch_width: int = option(
        32,
        "directions of each gradient that are measured; memory grows with it",
        group="Measuring",
        minimum=2,
        advanced=True,
        plain="how finely is measured: more is finer and takes more memory",
        more="32 is usual. What lies beyond is estimated from how the measured directions fall off.",
    )
    gradient_checkpointing: bool = same_as(TrainConfig, "gradient_checkpointing")
    recompute_layers: int | None = same_as(TrainConfig, "recompute_layers")
    base_precision: str = same_as(TrainConfig, "base_precision")
    offload_activations: bool = same_as(TrainConfig, "offload_activations")
    swap_blocks: int = same_as(TrainConfig, "swap_blocks")

    def __post_init__(self) -> None:
        if self.batches != "auto" and not (self.batches.isdecimal() and int(self.batches) >= 4):
            raise UserError(
                f"--batches {self.batches}: must be auto or a whole number of at least 4.",
                "Leave it away: auto stops by itself.",
            )
        if self.rank_min > self.rank_max:
            raise UserError(
                f"--rank-min {self.rank_min} is above --rank-max {self.rank_max}.", "Lower the one or raise the other."
            )
        if self.budget is None and not self.rank_min <= self.rank <= self.rank_max:
            raise UserError(
                f"--rank {self.rank} is not between --rank-min {self.rank_min} and --rank-max {self.rank_max}.",
                "Set --rank-min and --rank-max around --rank.",
            )
        low, high = self.timestep_range
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--focus {self.focus}: not a range of timesteps.",
                "Use balanced, texture, structure, or two numbers such as --focus 0.2,0.7",
            )

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Lowest and highest timestep that is measured; not in order when --focus is none."""
        if self.focus in FOCUS_RANGES:
            return FOCUS_RANGES[self.focus]
        try:
            low, high = (float(part) for part in self.focus.split(","))
        except ValueError:
            return (1.0, 0.0)
        return low, high


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelConfig):
    """`sample`: make audio with the base model plus an adapter."""

    adapter: Path | None = option(
        None,
        "adapter: a run's final/ or a checkpoint of it, or a file of any program; none samples the base model",
        group="Sample",
        plain="the adapter to listen to: the final/ folder of a run, or a file of any program",
        holds="adapter",
        kept=True,
        more=(
            "final/ is the end of a training, best/ its best moment, and each epoch_… in checkpoints/ an "
            "earlier one. Empty plays the model alone."
        ),
    )
    prompt: str = option(
        MISSING,
        "caption of the music",
        group="Sample",
        label="Caption of the music",
        plain="what the music should sound like, in a few words: style, instruments, mood",
        more=(
            "Begin with your trigger word, then say what one hears. Something that is not among your songs "
            "shows best what was learned: another voice, another tempo."
        ),
    )
    lyrics: str = option(
        "[Instrumental]",
        "lyrics; \\n begins a new line",
        group="Sample",
        plain="the words that are sung, or [Instrumental]; \\n begins a new line",
        more=("Marks such as [verse] and [chorus] tell the parts of a song. Half a minute holds two short verses."),
    )
    lyrics_file: Path | None = option(
        None,
        "text file with the lyrics, instead of --lyrics",
        group="Sample",
        plain="a text file with the words that are sung",
        holds="words",
        more="Easier than typing several verses here. It is read as UTF-8 or any usual encoding.",
    )
    language: str = option(
        "unknown",
        "language code of the lyrics, such as en",
        group="Sample",
        plain="in which language is sung, such as en, de or ja",
        more="unknown lets the model guess from the words. Naming it helps the pronunciation.",
    )
    bpm: int | None = option(
        None,
        "beats per minute",
        group="Sample",
        minimum=30,
        maximum=300,
        plain="how fast, in beats per minute; empty: as it comes",
        more="60 to 180 is usual music. The model keeps to it more or less.",
    )
    keyscale: str = option(
        "",
        'key, such as "A minor"',
        group="Sample",
        plain="in which key, such as A minor; empty: as it comes",
        more="The model keeps to it more or less. Empty leaves it free.",
    )
    timesignature: str = option(
        "",
        "2, 3, 4 or 6",
        group="Sample",
        plain="how many beats in a bar: 2, 3, 4 or 6; empty: as it comes",
        more="4 is most music, 3 a waltz. The model keeps to it more or less.",
    )
    duration: float = option(
        30.0,
        "seconds of audio; 0 with --think: as long as the composer plans it",
        group="Sample",
        minimum=0,
        maximum=600,
        plain="how many seconds of music",
        more=(
            "30 seconds are quickly made and tell sound and playing. The form of a song needs 120 or more. "
            "Up to ten minutes are possible."
        ),
    )
    strength: tuple[float, ...] = option(
        (0.0, 1.0),
        "adapter strengths, one file each; 0 is the base model",
        group="Sample",
        minimum=-4,
        maximum=4,
        plain="how strongly the adapter acts, a recording each: 0 is without it, 1 as it was trained",
        more=(
            "0 is the model alone, to compare with. If 0.6 sounds better than 1, it was trained a little too "
            "long, and 0.6 is a fine way to use it. Above 1 it is overdone on purpose."
        ),
    )
    steps: int | None = option(
        None,
        "denoising steps; default: 8 for turbo, 50 for sft, 32 for base",
        group="Sample",
        minimum=1,
        maximum=1000,
        plain="how long it works on the music; empty: as the model is meant",
        more="Turbo is made for 8, and more does not help it. base and sft sound rougher below 30.",
    )
    guidance: float | None = option(
        None,
        "guidance scale; default: 7, and none for turbo, which has it built in",
        group="Sample",
        minimum=1,
        plain="how strictly the caption is followed; 7 is usual, turbo: leave empty",
        more=(
            "High values follow the words and sound pressed; low ones are freer. Turbo was made without "
            "guidance. An adapter whose training hid no captions answers badly to it."
        ),
    )
    shift: float | None = option(
        None,
        "shift of the timesteps towards noise; default: the checkpoint's, else 3",
        group="Sample",
        above=0,
        advanced=True,
        plain="how long a song stays vague before details come; empty: as the model is meant",
        more="Empty is right for most. A higher one cares more for form, a lower one more for detail.",
    )
    timestep_mode: str = same_as(
        TrainConfig,
        "timestep_mode",
        group="Sample",
        help="sample as turbo (discrete) or as base and sft (logit-normal); auto asks the checkpoint",
    )
    seed: int = option(
        42,
        "seed of the noise, and of what the composer writes",
        group="Sample",
        minimum=0,
        maximum=LARGEST_SEED,
        plain="the same number makes the same piece; another number another one",
        more="Keep it while you compare strengths or adapters. Then try several: one piece says little.",
    )
    think: bool = option(
        False,
        "the language model first writes tempo, key and a sketch of the song, which the DiT follows, as in the app",
        group="Thinking",
        label="Let the composer think first?",
        plain="let the language model compose first, as the app does with thinking on",
        kept=True,
        more=(
            "The music follows a sketch then, with a clearer form. Making it takes longer. An adapter of "
            "the sound and one of the composer can be played together."
        ),
    )
    lm: str = option(
        "auto",
        "language model: 0.6B, 1.7B, 4B, a folder's name or path; auto takes the adapter's own, else 1.7B",
        group="Thinking",
        advanced=True,
        when=("think", True),
        plain="which language model composes; auto takes the adapter's own, else the app's usual one",
        more="1.7B is usual. An adapter of the composer fits only the size that it was trained on.",
    )
    lm_adapter: Path | None = option(
        None,
        "adapter of train-lm for the language model",
        group="Thinking",
        plain="the composer's adapter: the final/ or best/ folder of a run of train-lm",
        holds="adapter",
        when=("think", True),
        kept=True,
        more="It is what Train the composer leaves. Empty composes with the language model as it is.",
    )
    lm_strength: float = option(
        1.0,
        "strength of --lm-adapter",
        group="Thinking",
        minimum=-4,
        maximum=4,
        advanced=True,
        when=("think", True),
        plain="how strongly the composer's adapter acts: 0 not at all, 1 as it was trained",
        more="1 is usual. Lower it if everything follows one pattern.",
    )
    rewrite_caption: bool = option(
        False,
        "the language model writes the caption anew, and the DiT gets that one",
        group="Thinking",
        plain="let the language model say your description in its own words",
        when=("think", True),
        more=(
            "Short descriptions gain by it. What you wrote exactly may be lost, your trigger word too, so "
            "that No is usual with an adapter."
        ),
    )
    lm_temperature: float = option(
        0.85,
        "how freely the language model draws; 0 takes the likeliest",
        group="Thinking",
        minimum=0,
        maximum=5,
        advanced=True,
        when=("think", True),
        plain="how freely it composes: 0 always the same, 1 and more surprising",
        more="0.85 is the app's own. Far above 1 it loses its thread.",
    )
    lm_top_p: float = option(
        0.9,
        "the language model draws from the likeliest tokens that make up this share",
        group="Thinking",
        above=0,
        maximum=1,
        advanced=True,
        when=("think", True),
        plain="which ideas it may take: lower only the likely ones; 0.9 is usual",
        more="0.9 is the app's own. 1 also takes odd ones.",
    )
    lm_guidance: float = option(
        2.0,
        "how strictly the language model's sketch follows the caption; 1 is none",
        group="Thinking",
        minimum=1,
        maximum=20,
        advanced=True,
        when=("think", True),
        plain="how strictly the sketch follows the caption; 2 is usual, 1 lets it go free",
        more="2 is the app's own. High values make pieces that are alike.",
    )
    lm_negative: str = option(
        "",
        "what the sketch should not be like",
        group="Thinking",
        advanced=True,
        when=("think", True),
        plain="what the composer should keep away from, in a few words",
        more=("Empty is usual. Write it as a caption: slow, sad, solo piano. It acts only with a guidance above 1."),
    )
    output: Path = option(
        Path("samples"),
        "folder for the audio",
        group="Sample",
        plain="where the music goes",
        more=("Each piece has a name of its own, with its strength in it. Nothing that is there is written over."),
    )
    preview_variant: tuple[str, ...] = same_as(
        TrainConfig,
        "preview_variant",
        group="Sample",
        help="models that play it, such as base turbo, one after the other; default: --model-variant",
        label="Models that play it",
        more=(
            "Adapters trained on base are mostly played on turbo, where they sound different. Each model is played "
            "with its own usual steps and guidance, unless you say otherwise."
        ),
    )
    base_precision: str = same_as(TrainConfig, "base_precision", group="Sample")
    swap_blocks: int = same_as(TrainConfig, "swap_blocks", group="Sample")
    offload_encoder: bool = same_as(TrainConfig, "offload_encoder", group="Sample", plain="")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What `score` and `compare` share: by what adapters are judged, and on what."""

    checkpoint_dir: Path | None = option(
        None,
        "folder of the ACE-Step checkpoints; default: that of the run",
        group="Model",
        holds="checkpoints",
        plain="where the ACE-Step models are; empty: where the run had them",
        more="Empty is usual. Name it where the models have moved since the training.",
    )
    model_variant: str = option(
        "",
        "variant or folder name; default: that of the run",
        group="Model",
        plain="which model to judge on; empty: that of the run",
        more=("Empty is usual: an adapter is judged where it was trained. Another one says how it does elsewhere."),
    )
    dataset_dir: Path | None = option(
        None,
        "folder of preprocessed .pt tensors to judge by; default: that of the run",
        group="Data",
        holds="tensors",
        plain="the songs to judge by; empty: those of the run",
        more="Empty is usual. Songs that the run did not learn from say more than those that it did.",
    )
    device: str = same_as(ModelConfig, "device")
    precision: str = same_as(ModelConfig, "precision")
    attention: str = same_as(ModelConfig, "attention")
    strength: tuple[float, ...] = option(
        (1.0,),
        "adapter strengths to judge, such as 0.5,0.75,1,1.25",
        group="Judge",
        minimum=-4,
        maximum=4,
        plain="how strongly the adapter acts; several are compared with each other, such as 0.5,0.75,1,1.25",
        more=(
            "1 is as it was trained. With several it names the best of them, and takes as much longer. "
            "Adapters trained a little too long are often best at 0.6 to 0.8."
        ),
    )
    clips: int = option(
        8,
        "clips of music to make with each checkpoint and strength, for style and copying; 0 makes none",
        group="Judge",
        minimum=0,
        maximum=100,
        plain="how many pieces of music are made with each checkpoint, to listen to and to judge; 0 makes none",
        more="Making music takes most of the time. With 8 the intervals are wide, with 30 they are narrow.",
    )
    clip_seconds: float = option(
        15.0,
        "seconds of each clip",
        group="Judge",
        minimum=2,
        maximum=240,
        plain="how many seconds each of these pieces lasts",
        more="15 seconds tell sound and playing. Longer ones take as much longer to make.",
    )
    steps: int | None = same_as(SampleConfig, "steps", group="Judge")
    guidance: float | None = same_as(SampleConfig, "guidance", group="Judge")
    base_precision: str = same_as(TrainConfig, "base_precision")
    swap_blocks: int = same_as(TrainConfig, "swap_blocks")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(JudgeConfig):
    """`score`: which checkpoint of a run, at which strength, and is it any good?"""

    run_folder: Path = option(
        MISSING,
        "output folder of a run",
        "run",
        group="Judge",
        label="Run to judge",
        plain="the folder for the results of a training",
        holds="run",
        kept=True,
        more=(
            "All saved states of it are judged: how much of your songs they have learned, and how much else "
            "they have changed. Nothing in it is changed, unless the recommended one is to be kept."
        ),
    )
    average_from: int | None = option(
        None,
        "make one adapter of the checkpoints from this epoch on, into average/ of the run, and judge it with them",
        group="Judge",
        minimum=0,
        plain="also try the average of the saved states from this round on; empty: none",
        more=(
            "The last states of a training wobble around a good place; their average is often nearer to it than each "
            "of them. It takes at least two saved states."
        ),
    )
    keep: bool = option(
        False,
        "copy the recommended checkpoint to best/ of the run",
        group="Judge",
        plain="put the recommended checkpoint into best/, in place of what is there",
        more="No only names it. Yes copies it to best/, where you find it again; what was there is gone.",
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JudgeConfig):
    """`compare`: which of several adapters, of different runs or other programs?"""

    adapters: tuple[Path, ...] = option(
        (),
        "adapters: folders of runs' checkpoints, or files of any program",
        "adapter",
        group="Judge",
        label="Adapters to compare",
        plain="two or more adapters: the final/ folders of runs, or files of any program",
        more=(
            "They may be of different trainings or programs, for the same model. Each is judged on the same "
            "songs and with the same chance, so that the figures can be compared."
        ),
    )
    output: Path = option(
        Path("comparison"),
        "folder for figures and music",
        "--output",
        "-o",
        group="Judge",
        kept=True,
        plain="where figures, music and the listening page go",
        more="A new folder for each comparison keeps them apart. Delete it when you like.",
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """`demo`: the whole pipeline on a tiny built-in model and built-in music."""

    output_dir: Path = option(
        Path("side-step-demo"),
        "folder for the demo's files",
        group="Demo",
        label="Folder for the results",
        plain="where the demo's files go; delete it when you like",
        holds="new folder",
        more=(
            "It makes a tiny model and four short songs and takes them all the way. That shows that "
            "everything works here; the music is noise."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class PresetsConfig:
    """`presets`: look at presets, bring them in, hand them out."""

    action: str = option(
        "list",
        "list, show NAME, import FILE, or export NAME [FILE]",
        "action",
        group="Presets",
        choices=("list", "show", "import", "export"),
    )
    what: str = option("", "name of a preset, or the file to import", "what", group="Presets")
    file: Path | None = option(
        None, "export: the file to write; default: NAME.json in this folder", "file", group="Presets"
    )
    overwrite: bool = option(False, "replace a preset or file of the same name", group="Presets")

    def __post_init__(self) -> None:
        if self.action != "list" and not self.what:
            wanted = "the file of a preset" if self.action == "import" else "the name of a preset"
            raise UserError(
                f"presets {self.action} needs {wanted}.", f"See what there is: {side_step('presets', 'list')}"
            )


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """`history`: past runs and how well they went."""

    folder: Path = option(
        Path(),
        "a run's folder, or a folder that holds runs",
        "folder",
        group="History",
        label="Folder of runs",
        plain="the folder that your trainings went to; the folders in it are searched too",
        holds="runs",
        more="Each run is a row: when, which settings, how long, and how well it went. Nothing is changed.",
    )
    json: bool = option(
        False,
        "print one JSON object and nothing else",
        group="History",
        plain="print it for a program to read",
        more="For scripts only. A person reads the table more easily.",
    )


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """`clean`: free the disk of a run's old saved states."""

    folder: Path = option(
        MISSING,
        "a run's folder",
        "run",
        group="Clean",
        label="Run",
        plain="the run whose old saved states may go; the adapter itself stays",
        holds="run",
    )
    keep: int = option(1, "newest checkpoints that stay, to go on from", group="Clean", minimum=0)
    delete: bool = option(False, "delete them; without it, only say which and how much", group="Clean")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """`doctor`: what this machine offers, for the first run and for bug reports."""

    checkpoint_dir: Path | None = option(
        None,
        "also look at the checkpoints in this folder",
        group="Doctor",
        plain="also say which ACE-Step models are there",
        more="Useful before a bug report on a model. Empty looks at this computer alone.",
    )
    paths: bool = option(
        False,
        "name folders in full; leave it out of a public bug report",
        group="Doctor",
        plain="name folders in full; No keeps your name out of a bug report",
        more="No is usual: where things lie seldom matters. Yes helps where a folder is not found.",
    )
    json: bool = option(
        False,
        "print one JSON object and nothing else",
        group="Doctor",
        plain="print it for a program to read",
        more="For scripts only. A person reads the table more easily.",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`export`: an adapter for another program."""

    adapter: Path = option(
        MISSING,
        "adapter to export",
        "adapter",
        group="Export",
        plain="the final/ folder of a run, or a file of any program",
        holds="adapter",
        kept=True,
        more=(
            "ACE-Step's app and diffusers read the folder as it is, without an export. For another program "
            "it is written in that program's form. The adapter itself stays."
        ),
    )
    format: str = option(
        "peft",
        "peft folder, single file for comfyui, diffusers or lycoris, merged into the base, or merged-lm for train-lm's",
        group="Export",
        choices=("peft", "comfyui", "diffusers", "lycoris", "merged", "merged-lm"),
        plain="the program it is for; merged makes a complete model that needs no adapter",
        more=(
            "Take the program that you play with. peft is the form of the app. merged is large, because the "
            "whole model is in it, and works where no adapter can be loaded."
        ),
    )
    output: Path = option(
        MISSING,
        "where to write it",
        group="Export",
        plain="a folder or one .safetensors file, as the form has it",
        depends_on=("adapter", "format"),
        suggest=export_for,
        more=(
            "Programs want different things: ComfyUI one file, diffusers a folder. What is suggested suits the form."
        ),
    )
    strength: float = option(
        1.0,
        "strength at which it is stored",
        group="Export",
        plain="how strongly it acts where a program plays it at 1",
        more=(
            "1 is usual: programs have a knob of their own. Take what you found best in listening, such as "
            "0.7, for those that have none."
        ),
    )
    add: tuple[str, ...] = option(
        (),
        "further adapters to mix in, each as PATH or PATH:STRENGTH",
        group="Export",
        plain="two styles in one file, such as voice:0.5",
        more="Two at full strength are often too much: begin with 0.5 each. All must be for the same model.",
    )
    dtype: str = option(
        "keep",
        "numbers to store",
        group="Export",
        choices=("keep", "fp32", "fp16", "bf16"),
        plain="how exactly numbers are stored: fp16 and bf16 halve the file",
        more="keep is usual. Halving is not heard.",
    )
    base: Path | None = option(
        None,
        "folder of the ACE-Step checkpoints",
        group="Export",
        holds="checkpoints",
        plain="where the ACE-Step models are; asked for where the form needs them",
        more="Needed for a complete model, and for some kinds of adapter. Nothing in the folder is changed.",
    )
    model_variant: str = option(
        "turbo",
        "variant or folder name below --base",
        group="Export",
        kept=True,
        plain="which model a complete one is made of: the one that it was trained on",
        more="turbo is usual. On another model of the same size it works, and sounds different.",
    )
    lm: str = option(
        "auto",
        "merged-lm: language model below --base (0.6B, 1.7B, 4B, a name or path)",
        group="Export",
        advanced=True,
        when=("format", "merged-lm"),
        plain="what a complete one is made of; auto: the one that it was trained on",
        more="auto is right. An adapter of one size does not fit another.",
    )
    overwrite: bool = option(
        False,
        "replace what --output already holds",
        group="Export",
        plain="without it nothing is written where something is",
        more=("No stops where something is there. Yes puts the new one in its place whole, or leaves the old one."),
    )


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`inspect`: what an adapter file is and what each program makes of it."""

    path: Path = option(MISSING, "adapter folder or .safetensors file", "path", group="Inspect")
    json: bool = option(False, "print one JSON object and nothing else", group="Inspect")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`plan`: say, before anything is loaded, how much memory a run takes and whether it fits."""

    model_variant: str = same_as(ModelConfig, "model_variant", offers=None)
    checkpoint_dir: Path | None = option(
        None,
        "folder of the checkpoints; official variants are known without",
        group="Plan",
        label="Folder of the checkpoints",
        holds="checkpoints",
        kept=True,
        plain="where the ACE-Step models are; ACE-Step's own are known without",
        more="Empty is usual. Name it for a fine-tune or a merge.",
    )
    lm: str = option(
        "",
        "plan for the language model instead: 0.6B, 1.7B or 4B, known without files, or one below --checkpoint-dir",
        group="Plan",
        advanced=True,
        plain="plan for the composer in place of the model of sound; empty: the model of sound",
        more="0.6B, 1.7B and 4B are known without files. It says what training, listening and composing take.",
    )
    vram: float | None = option(
        None,
        "plan for a GPU of so many GiB; default: the GPU of this machine",
        group="Plan",
        above=0,
        plain="the memory of the card in GB; empty: the card of this computer",
        more=(
            "Good before buying or renting one: 8, 12, 16 and 24 are usual. What other programs hold is not counted."
        ),
    )
    dataset_dir: Path | None = option(
        None,
        "folder of tensors: plan for the longest of these songs",
        group="Plan",
        label="Folder of tensors",
        plain="plan for the longest of these songs; empty: for songs of the length below",
        more="The longest song sets the memory. Excerpts make all of them short.",
    )
    song_seconds: float = option(
        240.0,
        "length of the songs, where no folder is named",
        group="Plan",
        minimum=1,
        maximum=36_000,
        plain="how long your songs are, in seconds",
        more="240 is usual: four minutes. The longest song counts, not the mean.",
    )
    condition_tokens: int = option(
        512,
        "lyric and text tokens of a song",
        group="Plan",
        minimum=1,
        maximum=100_000,
        plain="how long caption and lyrics are; 512 is plenty for a song",
        more="It matters little beside the length of the music. Very long lyrics come to 1000 and more.",
    )
    json: bool = option(
        False,
        "print one JSON object and nothing else",
        group="Plan",
        plain="print it for a program to read",
        more="For scripts only. A person reads the table more easily.",
    )

    prior_data: Path | None = same_as(TrainConfig, "prior_data", group="Plan")
    prior_weight: float = same_as(TrainConfig, "prior_weight", group="Plan")
    precision: str = same_as(ModelConfig, "precision")
    attention: str = same_as(ModelConfig, "attention")
    preview_variant: tuple[str, ...] = same_as(TrainConfig, "preview_variant", group="Plan")
    preview_think: bool = same_as(TrainConfig, "preview_think", group="Plan")
    chunk_duration: float = same_as(TrainConfig, "chunk_duration")
    adapter_type: str = same_as(TrainConfig, "adapter_type")
    rank: int = same_as(TrainConfig, "rank")
    target_modules: tuple[str, ...] = same_as(TrainConfig, "target_modules")
    attention_type: str = same_as(TrainConfig, "attention_type")
    target_mlp: bool = same_as(TrainConfig, "target_mlp")
    batch_size: int = same_as(TrainConfig, "batch_size")
    optimizer_type: str = same_as(TrainConfig, "optimizer_type")
    gradient_checkpointing: bool = same_as(TrainConfig, "gradient_checkpointing")
    recompute_layers: int | None = same_as(TrainConfig, "recompute_layers")
    base_precision: str = same_as(TrainConfig, "base_precision")
    offload_activations: bool = same_as(TrainConfig, "offload_activations")
    swap_blocks: int = same_as(TrainConfig, "swap_blocks")


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """`completion`: what a shell needs to complete commands and flags."""

    shell: str = option(MISSING, "shell to print the script for", "shell", group="Completion", choices=SHELLS)


class Command(NamedTuple):
    """A command: its settings, one line of help, and the function that runs it.

    `run` is `module:function` below `sidestep`, taking (config, report). It is imported when the command runs, so that
    help needs no torch.
    """

    config: type
    help: str
    run: str
    spellings: tuple[str, ...] = ()  # other names it answers to


COMMANDS = {
    "fixed": Command(
        TrainConfig,
        "train an adapter; with --preprocess, turn audio into training tensors first",
        "cli.commands:train",
        spellings=("train",),
    ),
    "train-lm": Command(
        TrainLmConfig,
        "train an adapter for the language model, which composes (needs tensors with --regimes hints)",
        "cli.commands:train_lm",
    ),
    "preprocess": Command(PreprocessConfig, "turn audio into training tensors", "cli.commands:preprocess"),
    "build-dataset": Command(
        BuildDatasetConfig, "index a folder of audio and text into dataset.json", "cli.commands:build_dataset"
    ),
    "estimate": Command(
        EstimateConfig,
        "Preprocessing++: measure which modules respond to this music and give each its rank",
        "cli.commands:estimate",
    ),
    "plan": Command(
        PlanConfig,
        "say, before anything is loaded, how much memory a run takes and whether it fits",
        "cli.commands:plan",
    ),
    "sample": Command(SampleConfig, "make audio with the base model plus an adapter", "cli.commands:sample"),
    "score": Command(
        ScoreConfig,
        "judge the checkpoints of a run: what each has learned, what it spoils, and which to take",
        "tasks.score:score",
    ),
    "compare": Command(
        CompareConfig,
        "judge adapters of different runs or programs by the same figures",
        "tasks.score:compare",
    ),
    "export": Command(ExportConfig, "convert or merge an adapter for another program", "tasks.export:export"),
    "inspect": Command(
        InspectConfig,
        "show what an adapter is, and how strongly each program applies it",
        "tasks.inspect:inspect_adapter",
    ),
    "history": Command(HistoryConfig, "list past runs with their best loss", "tasks.history:history"),
    "clean": Command(CleanConfig, "delete a run's old checkpoints, after saying which", "tasks.clean:clean"),
    "demo": Command(DemoConfig, "the whole pipeline on a tiny built-in model and built-in music", "tasks.demo:demo"),
    "presets": Command(PresetsConfig, "list, show, import or export presets", "cli.commands:presets"),
    "doctor": Command(
        DoctorConfig, "show device, memory, precision and versions, for a bug report", "tasks.doctor:doctor"
    ),
    "completion": Command(
        CompletionConfig,
        "print the script with which a shell completes commands and flags of side-step",
        "cli.commands:completion",
    ),
}
SPELLINGS = {other: name for name, command in COMMANDS.items() for other in (name, *command.spellings)}


def command_of(config_class: type) -> str:
    """The name of the command that has these settings."""
    return next(name for name, command in COMMANDS.items() if command.config is config_class)


def check_streaming(config: Any) -> None:
    """Raises UserError where blocks are to be streamed from the CPU that are quantised, whose weights cannot be."""
    if config.swap_blocks and config.base_precision != "auto":
        raise UserError(
            f"--swap-blocks {config.swap_blocks} with --base-precision {config.base_precision}: "
            "quantised weights cannot be streamed.",
            "Use one of the two.",
        )


def memory_levers(config: Any) -> list[str]:
    """Flags of the config's command with which it takes less memory and which are not on, cheapest first."""
    batch = getattr(config, "batch_size", 1)
    runs = not isinstance(config, ExportConfig)  # there the size is that of the adapter
    fixed_base = bool(getattr(config, "swap_blocks", 0)) or getattr(config, "base_precision", "auto") != "auto"
    table = {
        "gradient_checkpointing": (True, not getattr(config, "gradient_checkpointing", True)),
        "batch_size": ("1 (with more --gradient-accumulation)", batch > 1),
        "offload_encoder": (True, not getattr(config, "offload_encoder", True)),
        "optimizer_type": ("adamw8bit", getattr(config, "optimizer_type", "") in ("adamw", "prodigy")),
        "lm": ("0.6B", getattr(config, "think", True) and getattr(config, "lm", "") != "0.6B" and runs),
        "base_precision": ("int8", not fixed_base),
        "offload_activations": (True, not getattr(config, "offload_activations", True)),
        "swap_blocks": ("16", not fixed_base),
        "chunk_duration": ("60", not 0 < getattr(config, "chunk_duration", 0.0) <= 60),
        "rank": (str(max(1, getattr(config, "rank", 0) // 2)), getattr(config, "rank", 0) > 8),
        "duration": (f"{getattr(config, 'duration', 0.0) / 2:g}", getattr(config, "duration", 0.0) > 20),
    }
    options = options_of(type(config))
    return [
        options[name].flag if value is True else f"{options[name].flag} {value}"
        for name, (value, helps) in table.items()
        if helps and name in options
    ]


def command_words(config: Any) -> list[str]:
    """The words after `train.py` that give this config: its command and flags."""
    words = [command_of(type(config)), *as_arguments(config)]
    sets_ranks = not changed_from_defaults(config).keys().isdisjoint(SET_BY_RANK_MAP)
    if isinstance(config, TrainConfig) and sets_ranks and not config.ignore_rank_map:
        # typed, they would go before the map
        words += ["--no-ignore-rank-map"] * (config.dataset_dir / RANK_MAP).is_file()
    return words


def resuming_line(folder: Path, settings: dict[str, Any]) -> str:
    """The line that goes on from a run's newest checkpoint, by the settings in its folder.

    Raises UserError where those are another version's.
    """
    kind = TrainLmConfig if "lm" in settings else TrainConfig
    return command_line(resolve(kind, settings, {"resume_from": "latest", "output_dir": str(folder)}))


def command_line(config: Any, then: TrainConfig | None = None) -> str:
    """The same as one line for the shell at hand, to show, store and paste. then: the training after preprocessing."""
    if then is None:
        return side_step(*command_words(config))
    of_training = as_arguments(then, but=options_of(type(config)))
    return side_step("fixed", "--preprocess", *as_arguments(config), *of_training)
