"""Which `generate` keeps its rows: each stays where it is in the batch, or is repeated in place.

A plan counts rows, and a count is no proof: a loop that drops finished rows, sorts them, or doubles the batch may come
to a number that fits. So several entries are served by loops whose code has been read, and refused by name in others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .. import errors

_MODELS = "transformers.models."
# What decodes, in any class. `generate` calls the others by these names.
LOOPS = ("generate", "_sample", "_beam_search", "_assisted_decoding", "_expand_inputs_for_generation")
# By the function that a class has of that name. GenerationMixin's `generate` expands once and then neither drops nor
# moves rows; those of models either do something and call it, or the `generate` of a model inside, with the very rows;
# or they call the model once. What they repeat is repeated in place. `_expand_inputs_for_generation` below counts
# inputs of other modalities, and calls GenerationMixin's for the rows.
_KEPT = {
    *(f"transformers.generation.utils.GenerationMixin.{name}" for name in LOOPS),
    *(
        f"{_MODELS}{name}"
        for name in (
            "apertus1p5.modeling_apertus1p5.Apertus1p5ForConditionalGeneration._expand_inputs_for_generation",
            "dots3_note.modeling_dots3_note.Dots3NoteForConditionalGeneration._expand_inputs_for_generation",
            "blip.modeling_blip.BlipForConditionalGeneration.generate",
            "blip.modeling_blip.BlipForQuestionAnswering.generate",
            "blip_2.modeling_blip_2.Blip2ForConditionalGeneration.generate",
            "granite_speech.modeling_granite_speech.GraniteSpeechForConditionalGeneration.generate",
            "granite_speech5.modeling_granite_speech5.GraniteSpeech5ForCTC.generate",
            "granite_speech_plus.modeling_granite_speech_plus.GraniteSpeechPlusForConditionalGeneration.generate",
            "instructblip.modeling_instructblip.InstructBlipForConditionalGeneration.generate",
            "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoForConditionalGeneration.generate",
            "kosmos2.modeling_kosmos2.Kosmos2ForConditionalGeneration.generate",
            "kyutai_speech_to_text.modeling_kyutai_speech_to_text.KyutaiSpeechToTextForConditionalGeneration.generate",
            "lasr.modeling_lasr.LasrForCTC.generate",
            "omniasr_ctc.modeling_omniasr_ctc.OmniASRForCTC.generate",
            "parakeet.modeling_parakeet.ParakeetForCTC.generate",
            "seamless_m4t.modeling_seamless_m4t.SeamlessM4TForSpeechToText.generate",
            "seamless_m4t.modeling_seamless_m4t.SeamlessM4TForTextToText.generate",
            "seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ForSpeechToText.generate",
            "seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ForTextToText.generate",
        )
    ),
}


_WHISPER = tuple(
    f"{_MODELS}whisper.generation_whisper.WhisperGenerationMixin.{name}"
    for name in ("generate", "generate_with_fallback", "_need_fallback")
)


def is_whisper(cls: Any) -> bool:
    """Whether the `generate` of `cls` is Whisper's, whose rows `Fallbacks` follows."""
    return tuple(_path(getattr(cls, path.rpartition(".")[2], None)) for path in _WHISPER) == _WHISPER


def check_kept(model: Any, cls: type, kwargs: Mapping[str, Any], loops: Sequence[str] = LOOPS) -> None:
    """Raise `AttributionError` unless `generate` with `kwargs` keeps the rows in each of `loops`. `cls` is the class
    that `model` had before it was patched."""
    if (given := kwargs.get("custom_generate")) is not None:
        refuse(model, f"custom_generate={given!r}")
    for name in loops:
        function = getattr(cls, name, None)
        if function is not None and _path(function) not in _KEPT:
            refuse(model, f"its {_path(function)}")


def _path(function: Any) -> str:
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', None)}"


def refuse(model: Any, what: str) -> NoReturn:
    """Raise `AttributionError` for several entries in a loop of its own."""
    raise errors.AttributionError(
        f"generate of {type(model).__name__} with several entries: {what} may drop, repeat or move rows of the batch, "
        f"so that they cannot be followed to their adapters. Use one entry for all rows, or one call a row"
    )
