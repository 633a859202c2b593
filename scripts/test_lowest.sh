#!/usr/bin/env bash
# Runs the tests with the lowest versions that pyproject.toml allows, pinned by constraints_lowest.txt, in an environment
# of their own: .venv_lowest, or $TRELLIS_VENV_LOWEST. On Linux, torch of that age brings CUDA along, 7 GB in all.
# Arguments go to pytest.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
TRELLIS_VENV="${TRELLIS_VENV_LOWEST:-$HERE/../.venv_lowest}"
TRELLIS_CONSTRAINTS=constraints_lowest.txt
TRELLIS_EXTRAS=meshes,tokens,viewer,test  # those of llm need younger versions of what we need
source "$HERE/setup.sh"
set_up
check_open3d
cd "$ROOT"
# Left out: what has nothing to do with versions of packages (documents, benchmarks, the demo), the browser, and tests of
# 8 seconds and more whose libraries are met in a shorter one too.
SLOW=(
    tests/test_checkpoint.py::test_a_run_starts_over_only_where_it_has_no_checkpoint_and_uses_its_own_frozen_weights
    tests/test_codebook_watch.py::test_a_collapsed_codebook_comes_back_to_life
    tests/test_codebook_watch.py::test_two_ranks_equal_one
    tests/test_fused.py::test_training_through_the_kernels_gives_the_plain_losses
    tests/test_models.py::test_posterior_sample_has_the_posterior_moments
    tests/test_stage1.py::test_a_run_with_the_cache_is_bit_equal_to_one_without
    tests/test_stage1.py::test_killed_and_continued_ends_in_the_same_weights
    tests/test_stage1.py::test_two_ranks_equal_one
    tests/test_to_tokens.py::test_a_rerun_makes_what_is_missing_and_nothing_else
    tests/test_to_tokens.py::test_machines_share_a_folder
    tests/test_to_tokens.py::test_two_processes_write_what_one_writes_wherever_they_are_started
    tests/test_tokenizer.py::test_a_run_gives_its_averaged_weights_and_what_its_data_were
    tests/test_tokenizer.py::test_encode_and_decode_are_what_the_trainer_reconstructs
    tests/test_train.py::test_keep_last_keeps_the_last_and_the_best
    tests/test_train.py::test_killed_at_random_moments_ends_in_the_same_weights
    tests/test_train.py::test_ranks_stop_together_and_go_on
)
exec "$PYTHON" -m pytest -q -n 2 --durations=10 \
    --ignore-glob="tests/test_bench*" --ignore-glob="tests/test_d[eo]*" --ignore=tests/test_profile.py \
    --ignore=tests/test_programs.py --ignore=tests/test_quality.py --ignore=tests/test_viewer_browser.py \
    "${SLOW[@]/#/--deselect=}" "$@"
