# The bookkeeping of scripts/test: steps with their time and log, and the count of tests that passed, failed, skipped.
# shellcheck shell=bash

PASSED=0 FAILED=0 SKIPPED=0
FAILURES=()       # one line each, shown again at the end
SKIPS=()          # "name: reason"
TEST_LOGS=$TARGET/test-logs
ALLOWED_SKIPS=$PROJECT/tests/allowed-skips

begin_report() {
    rm -rf "$TEST_LOGS"
    mkdir -p "$TEST_LOGS"
}

# run_step NAME TIMEOUT COMMAND…: runs it with its output in a log ($STEP_LOG); a sign of life now and then; the log's
# end if it fails. Its status is the command's.
run_step() {
    local name=$1 timeout=$2 start=$EPOCHREALTIME next=20 pid status=0 took
    STEP_LOG=$TEST_LOGS/$name.log
    shift 2
    printf '  %-58s' "$name" >&2
    timeout --kill-after=10 "$timeout" "$@" >"$STEP_LOG" 2>&1 </dev/null &
    pid=$!
    STEP_PID=$pid
    while kill -0 "$pid" 2>/dev/null; do
        took=$(seconds_since "$start")
        if ((${took%.*} >= next)); then
            next=$((next + 20))
            printf '\n    … %s s: %.100s' "$took" "$(tail -n 1 "$STEP_LOG" | tr -d '\r' | sed 's/\x1b\[[0-9;]*[mK]//g; s/^ *//')" >&2
            STEP_BROKEN_LINE=yes
        fi
        sleep 0.1
    done
    wait "$pid" || status=$?
    STEP_PID=''
    STEP_TIME=$(seconds_since "$start")
    if [[ ${STEP_BROKEN_LINE:-no} == yes ]]; then
        STEP_BROKEN_LINE=no
        printf '\n  %-58s' "$name" >&2
    fi
    return "$status"
}
at_exit '[[ -z ${STEP_PID:-} ]] || end_process "$STEP_PID"'

# What is to be added where the time was up.
step_timed_out() { (($1 != 124 && $1 != 137)) || echo ", not ended after $2 s"; }

step_result() { printf '%s%8s s\n' "$1" "$STEP_TIME" >&2; }
step_passed() { step_result "${GREEN}ok${PLAIN}     "; }
step_skipped() { step_result "${YELLOW}skipped${PLAIN}"; }
step_failed() {
    step_result "${RED}FAILED${PLAIN} "
    say "    from ${STEP_LOG#"$PROJECT"/}:"
    # Without colours; of Rust's standard harness, what the failed tests printed rather than the end.
    sed -E 's/\r$//; s/\x1b(\[[0-9;?]*[a-zA-Z]|\(B|c)//g' "$STEP_LOG" |
        awk '
            /^failures:$/ { excerpt = 1 }
            excerpt && lines < 100 { failures = failures $0 "\n"; lines++ }
            /^test result: / { excerpt = 0 }
            { end[NR % 40] = $0 }
            END {
                if (lines) printf "%s", failures
                else for (i = NR - 39; i <= NR; i++) if (i > 0) print end[i % 40]
            }' | sed 's/^/    | /' >&2
}

# A step that is one test: a check, a scenario. Sets STEP_STATUS.
test_step() {
    local name=$1 status=0
    run_step "$@" || status=$?
    STEP_STATUS=$status
    case $status in
        0)
            PASSED=$((PASSED + 1))
            step_passed
            ;;
        77)
            step_skipped
            collect_skips || add_skip "$name: without a reason"
            ;;
        *)
            FAILED=$((FAILED + 1))
            FAILURES+=("$name$(step_timed_out "$status" "$2") (${STEP_LOG#"$PROJECT"/})")
            step_failed
            ;;
    esac
}

# A step that builds for the next ones: it counts only if it fails. Its status is the command's.
build_step() {
    local passed=$PASSED
    test_step "$@"
    PASSED=$passed
    return "$STEP_STATUS"
}

# A step that holds many tests, all run by cargo: their numbers are read off its log. nextest prints one summary, the
# standard harness one line for each binary.
cargo_step() {
    local name=$1 status=0 passed failed printed
    run_step "$@" || status=$?
    sed -i 's/\x1b\[[0-9;]*m//g' "$STEP_LOG"
    passed=$(sum_of passed)
    failed=$(sum_of failed)
    if ((status != 0 && failed == 0)); then
        # It did not build, or it hung.
        failed=1
        FAILURES+=("$name$(step_timed_out "$status" "$2") (${STEP_LOG#"$PROJECT"/})")
    fi
    printed=${#SKIPS[@]}
    collect_skips || true
    # The harness takes a test that printed SKIP for one that passed.
    passed=$((passed - (${#SKIPS[@]} - printed)))
    PASSED=$((PASSED + passed)) FAILED=$((FAILED + failed))
    if ((status)); then
        while read -r test; do FAILURES+=("$test (${STEP_LOG#"$PROJECT"/})"); done < <(failed_tests)
        step_failed
    else
        step_passed
    fi
    say "      $passed passed, $failed failed"
}
sum_of() {
    { grep -E '^test result: |^ *Summary \[' "$STEP_LOG" || true; } |
        { grep -oE "[0-9]+ $1" || true; } | awk '{ n += $1 } END { print n + 0 }'
}
failed_tests() {
    sed -nE 's/^test (.*) \.\.\. FAILED$/\1/p; s/^ *(FAIL|TIMEOUT|SIG[A-Z]+|ABORT|LEAK-FAIL) \[[^]]*\] *(\([^)]*\) *)?(.*)$/\3/p' "$STEP_LOG" | sort -u
}

# Takes over the `SKIP name: reason` lines of the last step's log.
collect_skips() {
    local line found=1
    while IFS= read -r line; do
        add_skip "$line"
        found=0
    done < <(sed -nE 's/\r$//; s/^ *SKIP ([^][ ]+: .+)$/\1/p' "$STEP_LOG" | sort -u)
    return "$found"
}

# "name: reason"; in CI a skip is a failure unless tests/allowed-skips has a line for that name.
add_skip() {
    SKIPPED=$((SKIPPED + 1))
    SKIPS+=("$1")
    if [[ -n ${CI:-} ]] && ! skip_is_allowed "${1%%: *}"; then
        FAILED=$((FAILED + 1))
        FAILURES+=("${1%%: *} was skipped, and is not in tests/allowed-skips: ${1#*: }")
    fi
}

skip_is_allowed() {
    local allowed
    while IFS= read -r allowed; do
        [[ $allowed != '#'* && $allowed == *': '* ]] || continue
        # shellcheck disable=SC2053  # a pattern on purpose
        [[ $1 == ${allowed%%: *} ]] && return 0
    done <"$ALLOWED_SKIPS"
    return 1
}

end_report() {
    local line
    if ((${#SKIPS[@]})); then
        say ""
        say "skipped:"
        for line in "${SKIPS[@]}"; do say "  $line"; done
    fi
    if ((${#FAILURES[@]})); then
        say ""
        say "${RED}failed:${PLAIN}"
        for line in "${FAILURES[@]}"; do say "  $line"; done
    fi
    say ""
    if ((PASSED + FAILED + SKIPPED == 0)); then
        say "there is no test of that name; scripts/test --list names the checks and scenarios"
        FAILED=1
    fi
    echo "$PASSED passed, $FAILED failed, $SKIPPED skipped"
    ((FAILED == 0))
}
