//! The rows of the block backend's contract, each with a test that shows it; the list is compared with the source.

/// Theme of the contract, file of the test, name of the test.
const ROWS: &[(&str, &str, &str)] = &[
    (
        "change_media",
        "block/tests/contract/media.rs",
        "without_a_tray_eject_empties_the_drive_and_insert_fills_it_and_the_device_is_told_of_each",
    ),
    ("eject_request", "block/tests/contract/media.rs", "a_locked_tray_opens_only_by_force_and_the_guest_is_asked"),
    (
        "is_tray_open",
        "block/tests/contract/media.rs",
        "a_tray_opens_before_the_medium_goes_and_closes_after_it_came_and_events_tell_when_it_moved",
    ),
    ("is_medium_locked", "block/tests/contract/media.rs", "a_locked_tray_opens_only_by_force_and_the_guest_is_asked"),
    ("resize", "block/tests/contract/graph.rs", "a_resize_drains_and_tells_every_backend_above_the_node"),
    (
        "drained_begin, drained_poll, drained_end",
        "block/tests/contract/graph.rs",
        "a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between",
    ),
    (
        "create",
        "block/tests/contract/backends.rs",
        "a_new_backend_has_its_write_cache_on_and_stands_in_the_list_of_all",
    ),
    ("reference count", "block/tests/contract/backends.rs", "the_last_release_drains_first"),
    ("reference count", "block/tests/contract/backends.rs", "destroying_a_backend_that_has_a_name_is_a_bug_that_shows"),
    ("names", "block/tests/contract/backends.rs", "names_are_identifiers_unique_over_backends_and_nodes"),
    (
        "names",
        "block/tests/contract/backends.rs",
        "named_backends_are_listed_in_order_and_the_list_stays_as_it_is_while_they_change",
    ),
    (
        "removal by the monitor",
        "block/tests/contract/backends.rs",
        "drive_del_revokes_access_frees_the_name_and_leaves_the_object_to_its_holders",
    ),
    (
        "attach / detach",
        "block/tests/contract/backends.rs",
        "a_second_device_is_told_busy_and_a_detached_one_leaves_nothing_behind",
    ),
    (
        "setting callbacks",
        "block/tests/contract/graph.rs",
        "a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between",
    ),
    (
        "permissions",
        "block/tests/contract/graph.rs",
        "permissions_are_changed_all_the_way_down_or_not_at_all_and_an_error_names_both_users",
    ),
    (
        "insert / remove root",
        "block/tests/contract/backends.rs",
        "a_backend_outlives_its_medium_and_who_asked_is_told_of_each",
    ),
    (
        "availability",
        "block/tests/contract/media.rs",
        "a_tray_opens_before_the_medium_goes_and_closes_after_it_came_and_events_tell_when_it_moved",
    ),
    ("admission", "block/tests/drivers/conformance.rs", "resizing_keeps_what_is_left_and_adds_zeroes"),
    ("flush", "block/tests/contract/backends.rs", "all_backends_are_flushed_and_an_error_of_one_is_told"),
    ("write cache off", "tests/write_cache.rs", "a_guest_switches_it_off_and_on"),
    (
        "limits",
        "block/tests/contract/graph.rs",
        "users_who_write_in_small_units_are_kept_apart_from_those_that_were_there_before",
    ),
    ("quiesce", "block/tests/contract/graph.rs", "a_drain_of_a_node_covers_every_backend_above_it_and_no_other"),
    (
        "parked requests",
        "block/tests/contract/backends.rs",
        "a_request_that_was_parked_for_one_medium_never_reaches_another",
    ),
    ("drain", "block/tests/contract/graph.rs", "a_drain_waits_for_every_backend_and_parks_what_arrives_at_each"),
    ("drain", "block/tests/contract/graph.rs", "a_drain_returns_also_without_a_medium"),
    (
        "activation",
        "block/tests/contract/graph.rs",
        "a_node_is_inactive_only_with_all_that_stands_on_it_and_gives_its_locks_up",
    ),
    ("several iothreads", "block/tests/contract/graph.rs", "a_filter_goes_in_and_out_under_load_and_no_request_fails"),
    ("several iothreads", "tests/monitor/under_load.rs", "a_resize_under_load_fails_no_request"),
    ("on-error policy", "block/tests/contract/errors.rs", "each_policy_does_what_its_name_says_per_direction"),
    (
        "on-error policy",
        "vhost/queue/kept/tests.rs",
        "a_request_that_stops_the_device_is_kept_and_done_again_when_it_goes_on",
    ),
    ("on-error policy", "tests/error_policies.rs", "a_ring_that_stops_does_not_wait_for_space"),
    ("iostatus", "block/tests/contract/errors.rs", "the_first_error_that_stops_sticks_until_reset_or_a_new_device"),
    (
        "BLOCK_IO_ERROR",
        "block/tests/contract/errors.rs",
        "an_event_names_device_node_operation_action_and_reason_and_comes_after_the_status",
    ),
    (
        "BLOCK_IO_ERROR",
        "block/tests/contract/errors.rs",
        "events_come_once_a_second_for_a_device_but_for_those_that_stop_it",
    ),
    (
        "accounting",
        "block/tests/contract/errors.rs",
        "a_request_that_is_kept_does_not_count_as_failed_until_it_is_given_up",
    ),
    ("notifiers", "block/tests/contract/backends.rs", "a_backend_outlives_its_medium_and_who_asked_is_told_of_each"),
    (
        "operation blockers",
        "block/tests/contract/graph.rs",
        "a_blocked_operation_is_refused_with_the_name_of_the_blocker",
    ),
    ("root state", "block/tests/contract/backends.rs", "a_backend_outlives_its_medium_and_who_asked_is_told_of_each"),
    ("media change", "block/tests/contract/media.rs", "a_change_that_fails_brings_the_old_medium_back"),
    (
        "media change",
        "tests/monitor/under_load.rs",
        "a_change_of_medium_under_load_loses_no_request_and_mixes_no_media",
    ),
];

#[test]
fn every_row_has_its_test() {
    let project = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for (theme, file, test) in ROWS {
        let source = std::fs::read_to_string(project.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(source.contains(&format!("fn {test}")), "{theme}: {file} has no test {test}");
    }
}
