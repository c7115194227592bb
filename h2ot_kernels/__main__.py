"""python -m h2ot_kernels demo | evaluate | env | explain"""

import argparse
import json
import os
import sys

UNREAD = 141  # as a shell says of a program that SIGPIPE ended


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: done; 1: the demo found a wrong result; 2: bad input, said in one line on standard error (of
    a checkpoint that does not fit, a line for each parameter); 141: whoever reads the output (`| head`) has enough.
    """
    parser = argparse.ArgumentParser(prog="h2ot_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="2D keypoints in; what is right and how fast on this machine out"))
    _add_evaluate(commands.add_parser("evaluate", help="the error of a checkpoint (MPJPE, P-MPJPE) on a data set"))
    env = commands.add_parser("env", help="what a bug report needs, as JSON")
    env.set_defaults(run=_env)
    _add_explain(commands.add_parser("explain", help="which backend would run an operation, and why not the others"))
    try:
        try:
            options = parser.parse_args(arguments)
            return options.run(options)
        finally:
            print(end="", flush=True)  # what is left, while it can still be told that nobody reads it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python itself flushes once more
        return UNREAD


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", metavar="FILE", help=".npz, .npy or COCO-style .json keypoints; default: a made-up walker"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="hosts to run (see hosts.HOSTS); default: MixSTE's four",
    )
    parser.add_argument("--out", metavar="DIR", default="demo_out", help="where the report, poses and pictures go")
    parser.add_argument("--checkpoint", metavar="FILE", help="official checkpoint of the one model named")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the official formulation")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long the timing may take (default: 60)")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    try:
        from .demo.job import is_right, run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("matplotlib", "rich"):
            raise
        return _refuse(f"the demo needs {error.name}: pip install matplotlib rich")
    from .hosts import HOSTS

    names = options.model or []
    unknown = [name for name in names if name not in HOSTS]
    if unknown:
        return _refuse(f"--model: unknown {', '.join(unknown)}; wanted some of {', '.join(HOSTS)}")
    try:
        report = run(
            options.input,
            names,
            options.out,
            options.checkpoint,
            with_compile=options.compile,
            device=options.device,
            seconds=options.seconds,
        )
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _refuse(_said(error, options))
    return 0 if is_right(report) else 1


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", required=True, help="the host, such as hot_mixste")
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="its official checkpoint")
    parser.add_argument("--keypoints", metavar="FILE", required=True, help="2D file, VideoPose3D layout; or a clip")
    parser.add_argument("--poses", metavar="FILE", help="3D file, VideoPose3D layout; without: the clip's own poses")
    parser.add_argument("--subjects", metavar="NAME", nargs="+", default=["S9", "S11"], help="default: S9 S11")
    parser.add_argument("--no-flip", action="store_true", help="without the mirrored second pass")
    parser.add_argument("--batch", type=int, default=8, help="windows at a time (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from . import evaluation, hosts
    from .backend import check_named

    if options.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: this torch sees no GPU")
    seq2frame = {"pipeline": "seq2frame"} if options.model in hosts.SEQ2FRAME else {}
    try:
        if options.model not in hosts.HOSTS:
            raise ValueError(f"--model: got {options.model!r}, wanted one of {', '.join(hosts.LIFTING)}")
        hosts.require_lifting("--model", options.model)
        check_named(options.device)
        if options.batch < 1:
            raise ValueError(f"--batch: got {options.batch}, wanted 1 or more")
        model = hosts.load_checkpoint(hosts.build(options.model, **seq2frame), options.checkpoint)
        if options.poses is None:
            videos = [evaluation.read_clip_video(options.keypoints)]
        else:
            videos = evaluation.read_videos(options.keypoints, options.poses, tuple(options.subjects))
        scores = evaluation.evaluate(
            model, videos, with_flip=not options.no_flip, batch=options.batch, device=options.device
        )
    except (ValueError, OSError) as error:
        return _refuse(_said(error, options))
    if options.json:
        print(json.dumps([dataclasses.asdict(score) for score in scores], indent=1))
    else:
        print(f"{'action':<20} {'frames':>8} {'MPJPE mm':>10} {'P-MPJPE mm':>11}")
        for score in scores:
            print(f"{score.action:<20} {score.frames:>8} {score.mpjpe:>10.2f} {score.p_mpjpe:>11.2f}")
    return 0


def _env(options: argparse.Namespace) -> int:
    from . import env_report

    print(json.dumps(env_report(), indent=1))
    return 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", help="an operation, such as prune_cluster")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors would be")
    parser.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import explain

    if options.device == "cuda" and torch.cuda.is_available():
        torch.cuda.init()  # then it is known which GPUs there are
    try:
        with FakeTensorMode():  # a tensor on a GPU that need not be there
            print(explain(options.op, torch.empty(0, device=options.device)))
    except (ValueError, RuntimeError) as error:
        return _refuse(str(error).splitlines()[0])
    return 0


def _said(error: Exception, options: argparse.Namespace) -> str:
    """What error says, in the words of a command line: arguments of functions are called as the options are."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    name, colon, rest = str(error).partition(":")
    name = "model" if name == "models" else name
    return f"--{name}{colon}{rest}" if name in vars(options) else str(error)


def _refuse(message: str) -> int:
    print(f"h2ot_kernels: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
