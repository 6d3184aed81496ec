"""The words in which errors of libraries and of other processes are passed on."""

import pytest
import ray.exceptions

from spin_ray.errors import ModelError, UserError, first_line, last_line, memory_advice, user_error_in

_IN_A_WORKER = """\x1b[36mray::Worker.run()\x1b[39m (pid=1, ip=192.0.2.2)
  File "a.py", line 3, in run
    step()
    ^^^^^^
"""


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", "; memory ran out: lower it"),
        ("Task was killed due to the node running low on memory.", "; memory ran out: lower it"),
        ("ray.exceptions.OutOfMemoryError: …", "; memory ran out: lower it"),
        ("The worker died unexpectedly while executing this task. Check …", "; if memory ran out, lower it"),
        ("no room in the queue", ""),
    ],
)
def test_an_error_of_memory_says_what_to_lower(text, advice):
    assert memory_advice(RuntimeError(text), "lower it") == advice


def test_a_process_that_was_killed_is_told_without_rays_list_of_causes() -> None:
    """Ray 2.60 has the same words for SIGKILL and for a crash."""
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 7\n\tip: 192.0.2.2\n"
    detail = "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) …"
    error = ray.exceptions.ActorDiedError()
    error.error_msg = f"{died}The actor is dead because its worker process has died. Worker exit detail: {detail}"
    assert first_line(error) == last_line(error) == "a process (pid 7 on 192.0.2.2) was killed by the system or crashed"
    assert memory_advice(error, "lower it") == "; if memory ran out, lower it"
    assert last_line(ray.exceptions.WorkerCrashedError()) == "a process was killed by the system or crashed"


def test_the_first_line_of_an_error_has_text_and_is_no_title_of_a_process() -> None:
    assert first_line(ImportError("\nLlamaConverter requires the protobuf library\nbut it was not found")) == (
        "LlamaConverter requires the protobuf library"
    )
    assert first_line(ValueError(" \n")) == "ValueError"
    task = ray.exceptions.RayTaskError("f", f"{_IN_A_WORKER}KeyError: 1", KeyError(1))
    assert first_line(task) == "KeyError: 1"


def test_the_line_of_an_error_that_is_passed_on_is_what_happened_not_a_page_of_advice() -> None:
    """As Ray 2.60 words it when its memory monitor kills a worker."""
    text = "Task was killed due to the node running low on memory.\nRefer to the documentation on how to address the …"
    assert last_line(RuntimeError(text)) == "Task was killed due to the node running low on memory."
    assert len(last_line(RuntimeError("x" * 5000))) < 500
    text = (
        "Training failed due to controller error:\n3 worker(s) were killed due to the node running low on memory. "
        "Memory on the node (IP: 10.0.0.7, ID: 089db5bb) was 21.37GB used / 23.54GB limit (0.908006)\nOOM kill: …"
        "\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n27553\t1.69\tpython\n30191\t0.66\tray::ServeReplica"
    )
    assert last_line(ray.exceptions.RayError(text)) == (
        "3 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7) was 21.37GB "
        "used / 23.54GB limit"
    )


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered\nSearch for `cudaError…' in "
            "https://docs.nvidia.com\nCUDA kernel errors might be asynchronously reported\n"
            "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n",
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        ),
        (
            "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:\nRuntimeError: no such kernel\n\n"
            "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace",
            "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised: RuntimeError: no such kernel",
        ),
        (
            'torch._dynamo.exc.Unsupported: a call\n  Hint: none\n\nfrom user code:\n   File "b.py", line 1, in f\n'
            "    call()\n\nSet TORCHDYNAMO_VERBOSE=1",
            "torch._dynamo.exc.Unsupported: a call",
        ),
        (
            "ray.exceptions.ActorDiedError: The actor died unexpectedly.\n\tpid: 7\nThe actor is dead because of x.",
            "The actor is dead because of x.",
        ),
        ("ValueError", "ValueError"),
    ],
)
def test_of_a_message_of_several_lines_after_a_traceback_the_first_is_told(message: str, line: str) -> None:
    """As torch 2.13 and Ray 2.60 word them. Only Ray has its reason last."""
    earlier = _IN_A_WORKER + "KeyError: 1\n\nThe above exception was the direct cause of the following exception:\n\n"
    assert last_line(RuntimeError(_IN_A_WORKER + message)) == line
    assert last_line(RuntimeError(earlier + _IN_A_WORKER + message)) == line


def test_pydantics_advice_is_no_cause() -> None:
    class Error(Exception):
        pass

    said = (
        "ray.exceptions.RayTaskError(ValidationError): \n1 validation error for CacheConfig\ncache_dtype\n"
        "  Input should be 'auto' or 'fp8' [type=literal_error, input_value='fp9', input_type=str]\n"
        "    For further information visit https://errors.pydantic.dev/2.12/v/literal_error"
    )
    assert last_line(Error(said)) == (
        "cache_dtype: Input should be 'auto' or 'fp8' [type=literal_error, input_value='fp9', input_type=str]"
    )


def test_what_a_user_can_mend_comes_out_of_another_process_as_itself_and_whole():
    text = (
        "ray::_Map.run()\n  File a.py\nspin_ray.errors.ModelError: scorer.path m: is no reward model\u2028" + "x" * 500
    )
    found = user_error_in(RuntimeError(text))
    assert type(found) is ModelError and str(found).endswith("is no reward model\u2028" + "x" * 500)
    of_a_task = RuntimeError("a traceback of many lines")
    of_a_task.cause = found  # type: ignore[attr-defined]  # as Ray's RayTaskError has it
    assert user_error_in(of_a_task) is found
    assert type(user_error_in(RuntimeError("spin_ray.errors.OtherRunError: r: holds another run"))) is UserError
    assert user_error_in(RuntimeError("spin_ray.errors.StageError: it failed")) is None
    assert user_error_in(RuntimeError("ValueError: 1")) is None
