"""The 78 bad inputs of the acceptance list, and which tests send each: the table, and that it is true.

``http`` is the engine's own API, ``others`` are Forge's API and Cog's server, where a case applies to them; those of
the command line have a table of their own, by the same numbers. Each named test exists, and its file names the case by
its number or is about that case alone.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import NamedTuple

import pytest
from running_service import PROJECT


class Case(NamedTuple):
    what: str
    http: str
    others: str = ""


BAD, FORGE, COG = "test_bad_inputs", "test_sdapi.test_bad_input", "test_cog.test_bad_inputs"
FORGE_PICTURES, COG_LORAS = "test_sdapi.test_bad_pictures", "test_cog.test_bad_loras"
COG_PROMPTS = "test_cog.test_odd_prompts"

CASES: dict[int, Case] = {
    1: Case("width 0", f"{BAD}.test_numbers", FORGE),
    2: Case("width -512", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    3: Case("width 511", f"{BAD}.test_numbers_that_are_accepted", "test_sdapi.test_a_size_that_is_no_multiple_of_8"),
    4: Case("100000x100000", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    5: Case("a width as text", f"{BAD}.test_numbers_that_are_accepted"),
    6: Case("width 512.5", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    7: Case("numbers that are not finite", f"{BAD}.test_7_numbers_that_are_not_finite"),
    8: Case("no steps", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    9: Case("too many steps", f"{BAD}.test_numbers", COG),
    10: Case("an empty or huge batch", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    11: Case("too much work", f"{BAD}.test_numbers", FORGE),
    12: Case("seeds that are none", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    13: Case("guidance out of bounds", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    14: Case("negative distilled guidance", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    15: Case("a strength out of bounds", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    16: Case("strength 0", f"{BAD}.test_numbers_that_are_accepted"),
    17: Case("a hires scale out of bounds", f"{BAD}.test_numbers", f"{FORGE} {COG}"),
    18: Case("a hires pass of one pixel", f"{BAD}.test_numbers", FORGE),
    19: Case(
        "an unknown sampler", f"{BAD}.test_names", f"{FORGE} {COG} test_webuiapi.test_c28_a_sampler_that_does_not_exist"
    ),
    20: Case("an unknown scheduler", f"{BAD}.test_names", f"{FORGE} {COG}"),
    21: Case("an unknown checkpoint", f"{BAD}.test_names", "test_sdapi.test_models_that_are_not_there"),
    22: Case("../../etc/passwd", f"{BAD}.test_names {BAD}.test_22_a_name_that_leads_outside_opens_nothing", COG),
    23: Case("an absolute path", f"{BAD}.test_names {BAD}.test_23_paths_of_the_models_folder"),
    24: Case("a NUL in a name", f"{BAD}.test_names"),
    25: Case("a link that leads outside", f"{BAD}.test_names"),
    26: Case("look-alike letters, 4096 of them", f"{BAD}.test_names"),
    27: Case("a detector with a program in it", f"{BAD}.test_names", f"{FORGE} {COG}"),
    28: Case("an unknown script", f"{BAD}.test_names", FORGE),
    29: Case("the detailer's arguments", f"{BAD}.test_names", f"{FORGE} {COG}"),
    30: Case("X/Y/Z plot", f"{BAD}.test_names", FORGE),
    31: Case("no start picture", f"{BAD}.test_pictures", FORGE_PICTURES),
    32: Case("an empty one", f"{BAD}.test_pictures", FORGE_PICTURES),
    33: Case("no base64", f"{BAD}.test_pictures", f"{FORGE_PICTURES} {COG}"),
    34: Case("base64 of something else", f"{BAD}.test_pictures", f"{FORGE_PICTURES} {COG}"),
    35: Case("a data URL of the wrong type", f"{BAD}.test_pictures_that_are_accepted"),
    36: Case("30000x30000 in a header", f"{BAD}.test_pictures"),
    37: Case("a text that swells", f"{BAD}.test_pictures"),
    38: Case("half a JPEG", f"{BAD}.test_pictures"),
    39: Case("CMYK, 16 bits, a palette, alpha, turned", f"{BAD}.test_pictures_that_are_accepted"),
    40: Case("a mask of another size", f"{BAD}.test_masks"),
    41: Case("a mask of nothing", f"{BAD}.test_masks"),
    42: Case("a body of 2 GB", f"{BAD}.test_42_a_body_of_two_gigabytes"),
    43: Case("a body without a length", f"{BAD}.test_43_a_body_without_a_length"),
    44: Case("a URL where they are off", f"{BAD}.test_44_urls_are_off_at_first", FORGE_PICTURES),
    45: Case("addresses of this machine", f"{BAD}.test_45_46_addresses_of_this_machine", COG),
    46: Case("addresses of the cloud's metadata", f"{BAD}.test_45_46_addresses_of_this_machine", COG),
    47: Case("a redirect to this machine", f"{BAD}.test_47_a_redirect_to_this_machine"),
    48: Case("a name that is rebound", "test_rebinding.test_the_checked_address_is_the_one_that_is_connected_to"),
    49: Case("URLs that programs read differently", f"{BAD}.test_pictures", COG),
    50: Case("file, ftp, gopher, data", f"{BAD}.test_pictures", COG),
    51: Case(
        "file:///etc/passwd",
        f"{BAD}.test_pictures",
        f"{COG} test_cog.test_nothing_secret_was_logged_and_no_file_is_left",
    ),
    52: Case("a LoRA's server that fails", f"{BAD}.test_loras {BAD}.test_52_a_server_that_speaks_no_tls", COG_LORAS),
    53: Case("a page in place of a LoRA", f"{BAD}.test_loras", COG_LORAS),
    54: Case("a redirect to this machine", f"{BAD}.test_loras", COG),
    55: Case("10 GB, or no end", f"{BAD}.test_loras"),
    56: Case("a byte now and then", f"{BAD}.test_56_a_trickle"),
    57: Case("another file than was meant", f"{BAD}.test_57_not_the_file_that_was_meant"),
    58: Case("cut off, and no ranges", f"{BAD}.test_58_64_67_a_lora_that_is_fetched"),
    59: Case(
        "a full disk",
        "test_full_disk.test_a_small_file_system test_full_disk.test_a_limit_on_what_the_worker_may_write",
    ),
    60: Case("a LoRA of another model", f"{BAD}.test_loras {BAD}.test_loras_of_the_folder", COG_LORAS),
    61: Case("NaN, infinite, empty, a key twice", f"{BAD}.test_loras {BAD}.test_loras_of_the_folder"),
    62: Case("rank 4096, other shapes", f"{BAD}.test_loras {BAD}.test_loras_of_the_folder"),
    63: Case("pickles and archives by URL", f"{BAD}.test_loras", f"{COG} {COG_LORAS}"),
    64: Case("one new URL twice at once", f"{BAD}.test_58_64_67_a_lora_that_is_fetched"),
    65: Case("100 LoRAs", f"{BAD}.test_numbers", COG),
    66: Case("a strength of NaN or a million", f"{BAD}.test_numbers {BAD}.test_prompts", COG),
    67: Case("a token in a URL", f"{BAD}.test_58_64_67_a_lora_that_is_fetched", COG_LORAS),
    68: Case("an empty prompt", f"{BAD}.test_prompts", COG_PROMPTS),
    69: Case("a prompt of a megabyte", f"{BAD}.test_prompts", f"{COG} test_webuiapi.test_c29_a_prompt_of_a_megabyte"),
    70: Case("any script", f"{BAD}.test_prompts", f"{COG_PROMPTS} test_webuiapi.test_c29_prompts_in_any_script"),
    71: Case(
        "10000 brackets, a tag without end",
        f"{BAD}.test_prompts",
        f"{COG_PROMPTS} test_prompt_limits.test_the_plan_and_the_command_line_refuse_it_too",
    ),
    72: Case("a LoRA twice", f"{BAD}.test_prompts"),
    73: Case(
        "bodies that are no JSON object",
        f"{BAD}.test_73_bodies {BAD}.test_73_other_types",
        "test_cog.test_what_is_no_request",
    ),
    74: Case("no key, or a wrong one", "test_faults.test_keys", "test_webuiapi.test_c1_with_and_without_a_key"),
    75: Case("another host, another origin", "test_faults.test_hosts_and_origins"),
    76: Case(
        "a full queue, draining, not ready",
        "test_service.test_a_full_queue test_queue_shares.test_one_caller_has_a_share_of_the_queue "
        "test_faults.test_a_job_that_does_not_end_in_time_is_told_503_not_500 "
        "test_faults.test_a_service_that_is_not_ready_says_so",
    ),
    77: Case("cancelling what is unknown, over, or twice", f"{BAD}.test_77_cancelling test_service.test_cancel"),
    78: Case(
        "SIGTERM, SIGKILL, no memory, in the middle of a job",
        "test_recovery.test_after_a_fault_all_is_as_before test_recovery.test_after_sigterm_a_new_service_goes_on",
        "test_engine.test_out_of_memory_ends_the_job_and_not_the_engine",
    ),
}


@cache
def written_in(module: str) -> tuple[str, frozenset[str]]:
    """The text of a file of tests, and the names of its functions."""
    paths = [PROJECT / "tests" / folder / f"{module}.py" for folder in ("api", "unit")]
    text = next(path for path in paths if path.exists()).read_text(encoding="utf-8")
    return text, frozenset(node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))


def test_the_list_is_whole() -> None:
    assert list(CASES) == list(range(1, 79))


@pytest.mark.parametrize("number", CASES)
def test_each_case_has_its_tests(number: int) -> None:
    case = CASES[number]
    for name in f"{case.http} {case.others}".split():
        module, _, function = name.partition(".")
        text, functions = written_in(module)
        assert function in functions, name
        assert module != BAD or re.search(rf"(?<!\d){number}(?!\d)", text), f"{BAD} does not name {number}"


def test_those_of_the_command_line_have_the_same_numbers() -> None:
    text, _ = written_in("test_cli_bad_inputs")
    numbers = {int(number) for number in re.findall(r'^    "(\d+) ', text, re.MULTILINE)}
    assert numbers <= set(CASES) and len(numbers) > 30
