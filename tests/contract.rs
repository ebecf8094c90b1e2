//! The rows of the block backend's contract, each with a test that shows it; the lists are
//! compared with the source.

/// Themes of the contract, in its order, each with the files and names of its tests.
const ROWS: &[(&str, &[(&str, &str)])] = &[
    (
        "change_media",
        &[(
            "block/tests/contract/media.rs",
            "without_a_tray_eject_empties_the_drive_and_insert_fills_it_and_the_device_is_told_of_each",
        )],
    ),
    ("eject_request", &[("block/tests/contract/media.rs", "a_locked_tray_opens_only_by_force_and_the_guest_is_asked")]),
    (
        "is_tray_open",
        &[(
            "block/tests/contract/media.rs",
            "a_tray_opens_before_the_medium_goes_and_closes_after_it_came_and_events_tell_when_it_moved",
        )],
    ),
    (
        "is_medium_locked",
        &[("block/tests/contract/media.rs", "a_locked_tray_opens_only_by_force_and_the_guest_is_asked")],
    ),
    ("resize", &[("block/tests/contract/graph.rs", "a_resize_drains_and_tells_every_backend_above_the_node")]),
    (
        "drained_begin",
        &[(
            "block/tests/contract/graph.rs",
            "a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between",
        )],
    ),
    (
        "drained_poll",
        &[(
            "block/tests/contract/graph.rs",
            "a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between",
        )],
    ),
    (
        "drained_end",
        &[(
            "block/tests/contract/graph.rs",
            "a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between",
        )],
    ),
    (
        "create",
        &[("block/tests/contract/backends.rs", "a_new_backend_has_its_write_cache_on_and_stands_in_the_list_of_all")],
    ),
    (
        "reference count",
        &[
            ("block/tests/contract/backends.rs", "the_last_release_drains_first"),
            ("block/tests/contract/backends.rs", "destroying_a_backend_that_has_a_name_is_a_bug_that_shows"),
            ("block/tests/contract/backends.rs", "destroying_a_backend_that_somebody_watches_is_a_bug_that_shows"),
            ("block/tests/contract/backends.rs", "destroying_a_backend_inside_a_drained_section_is_a_bug_that_shows"),
        ],
    ),
    (
        "names",
        &[
            ("block/tests/contract/backends.rs", "names_are_identifiers_unique_over_backends_and_nodes"),
            (
                "block/tests/contract/backends.rs",
                "named_backends_are_listed_in_order_and_the_list_stays_as_it_is_while_they_change",
            ),
        ],
    ),
    (
        "removal by the monitor",
        &[(
            "block/tests/contract/backends.rs",
            "drive_del_revokes_access_frees_the_name_and_leaves_the_object_to_its_holders",
        )],
    ),
    (
        "attach / detach",
        &[(
            "block/tests/contract/backends.rs",
            "a_second_device_is_told_busy_and_a_detached_one_leaves_nothing_behind",
        )],
    ),
    (
        "setting callbacks",
        &[(
            "block/tests/contract/graph.rs",
            "a_device_is_told_of_the_first_begin_and_the_last_end_only_and_is_polled_between",
        )],
    ),
    (
        "permissions",
        &[
            (
                "block/tests/contract/graph.rs",
                "permissions_are_changed_all_the_way_down_or_not_at_all_and_an_error_names_both_users",
            ),
            ("block/drivers/file/lock.rs", "a_refused_change_leaves_the_locks_as_they_were"),
            ("block/tests/drivers/file.rs", "qemu_does_not_write_to_an_image_that_we_write_to"),
            ("block/tests/drivers/file.rs", "we_do_not_write_to_an_image_that_qemu_writes_to"),
        ],
    ),
    (
        "insert / remove root",
        &[("block/tests/contract/backends.rs", "a_backend_outlives_its_medium_and_who_asked_is_told_of_each")],
    ),
    (
        "availability",
        &[(
            "block/tests/contract/media.rs",
            "a_tray_opens_before_the_medium_goes_and_closes_after_it_came_and_events_tell_when_it_moved",
        )],
    ),
    (
        "admission",
        &[
            (
                "block/tests/contract/requests.rs",
                "what_lies_out_of_range_is_refused_with_the_size_of_the_moment_in_which_the_drain_ends",
            ),
            ("block/tests/drivers/conformance.rs", "what_lies_outside_is_refused_and_nothing_is_allowed"),
        ],
    ),
    (
        "order of steps",
        &[(
            "block/tests/contract/requests.rs",
            "a_request_waits_for_the_drain_then_its_range_is_checked_then_it_waits_for_limits_then_it_is_made_stable",
        )],
    ),
    (
        "completion",
        &[(
            "block/tests/contract/requests.rs",
            "a_request_completes_on_the_context_that_it_was_submitted_on_and_before_a_drain_ends",
        )],
    ),
    (
        "cancel",
        &[(
            "block/tests/contract/requests.rs",
            "a_cancelled_request_completes_once_given_up_where_it_waits_and_whole_where_it_runs",
        )],
    ),
    (
        "flush",
        &[
            ("block/tests/simulation/main.rs", "what_was_promised_is_there_after_the_power_failed"),
            ("block/tests/contract/backends.rs", "all_backends_are_flushed_and_an_error_of_one_is_told"),
        ],
    ),
    (
        "write cache off",
        &[
            ("block/tests/simulation/main.rs", "what_was_promised_is_there_after_the_power_failed"),
            ("tests/write_cache.rs", "a_guest_switches_it_off_and_on"),
        ],
    ),
    (
        "discard",
        &[
            ("block/tests/drivers/file.rs", "discard_gives_space_back_and_zeroes_keep_it_unless_they_may_not"),
            ("block/tests/drivers/conformance.rs", "what_lies_outside_is_refused_and_nothing_is_allowed"),
        ],
    ),
    (
        "write zeroes",
        &[
            ("block/tests/drivers/file.rs", "discard_gives_space_back_and_zeroes_keep_it_unless_they_may_not"),
            ("block/tests/drivers/conformance.rs", "random_requests_give_what_the_oracle_says"),
        ],
    ),
    (
        "block status",
        &[(
            "block/tests/contract/requests.rs",
            "the_status_of_a_range_says_what_is_there_put_together_and_never_past_the_end",
        )],
    ),
    (
        "limits",
        &[
            ("block/tests/drivers/faults.rs", "two_iothreads_write_halves_of_one_block_and_lose_nothing"),
            (
                "block/tests/contract/graph.rs",
                "users_who_write_in_small_units_are_kept_apart_from_those_that_were_there_before",
            ),
        ],
    ),
    (
        "quiesce",
        &[
            ("block/tests/contract/graph.rs", "a_drain_of_a_node_covers_every_backend_above_it_and_no_other"),
            ("block/tests/contract/throttling.rs", "a_request_that_a_limit_holds_back_is_released_by_a_drain"),
        ],
    ),
    (
        "parked requests",
        &[
            ("block/tests/contract/backends.rs", "a_request_that_was_parked_for_one_medium_never_reaches_another"),
            ("block/tests/contract/graph.rs", "a_drain_waits_for_every_backend_and_parks_what_arrives_at_each"),
        ],
    ),
    (
        "drain",
        &[
            ("block/tests/contract/graph.rs", "a_drain_waits_for_every_backend_and_parks_what_arrives_at_each"),
            ("block/tests/contract/graph.rs", "a_drain_returns_also_without_a_medium"),
        ],
    ),
    (
        "activation",
        &[(
            "block/tests/contract/graph.rs",
            "a_node_is_inactive_only_with_all_that_stands_on_it_and_gives_its_locks_up",
        )],
    ),
    (
        "AioContext",
        &[
            ("block/tests/contract/contexts.rs", "a_move_takes_the_whole_connected_graph_and_no_other"),
            (
                "block/tests/contract/contexts.rs",
                "a_move_that_a_device_forbids_or_that_fails_leaves_all_where_they_are",
            ),
            ("block/tests/contract/contexts.rs", "who_watches_contexts_follows_the_root_over_insert_and_remove"),
        ],
    ),
    (
        "several iothreads",
        &[
            ("block/tests/contract/graph.rs", "a_filter_goes_in_and_out_under_load_and_no_request_fails"),
            ("block/tests/drivers/conformance.rs", "two_iothreads_at_once_lose_nothing"),
            ("tests/monitor/under_load.rs", "a_resize_under_load_fails_no_request"),
        ],
    ),
    (
        "plug",
        &[
            ("block/tests/contract/requests.rs", "requests_of_one_plug_reach_the_kernel_together_and_plugs_nest"),
            ("block/tests/contract/requests.rs", "a_plug_that_is_forgotten_ends_with_the_turn"),
            ("block/tests/contract/requests.rs", "a_drain_lets_what_is_plugged_go"),
        ],
    ),
    (
        "on-error policy",
        &[
            ("block/tests/contract/errors.rs", "each_policy_does_what_its_name_says_per_direction"),
            ("vhost/queue/kept/tests.rs", "a_request_that_stops_the_device_is_kept_and_done_again_when_it_goes_on"),
            ("tests/error_policies.rs", "a_ring_that_stops_does_not_wait_for_space"),
        ],
    ),
    (
        "iostatus",
        &[("block/tests/contract/errors.rs", "the_first_error_that_stops_sticks_until_reset_or_a_new_device")],
    ),
    (
        "BLOCK_IO_ERROR",
        &[
            (
                "block/tests/contract/errors.rs",
                "an_event_names_device_node_operation_action_and_reason_and_comes_after_the_status",
            ),
            ("block/tests/contract/errors.rs", "events_come_once_a_second_for_a_device_but_for_those_that_stop_it"),
        ],
    ),
    (
        "accounting",
        &[
            ("block/tests/contract/errors.rs", "a_request_that_is_kept_does_not_count_as_failed_until_it_is_given_up"),
            ("block/tests/contract/statistics.rs", "requests_take_as_long_as_they_do"),
            ("block/tests/contract/statistics.rs", "what_is_under_way_is_counted_and_what_is_parked_too"),
            (
                "block/tests/contract/statistics.rs",
                "histograms_count_from_the_moment_they_are_set_in_the_intervals_that_were_asked_for",
            ),
        ],
    ),
    (
        "throttle",
        &[
            ("block/tests/contract/throttling.rs", "limits_are_set_changed_and_lifted_while_requests_run"),
            ("block/tests/contract/throttling.rs", "backends_share_a_group_by_its_name_and_leave_it_alone"),
            (
                "block/throttle/tests.rs",
                "every_rate_is_kept_within_3_percent_over_10_seconds_from_the_first_request_on",
            ),
            ("block/throttle/tests.rs", "members_share_evenly_however_many_requests_each_has_waiting"),
        ],
    ),
    (
        "request merging",
        &[
            (
                "block/tests/contract/requests.rs",
                "neighbours_in_a_batch_become_one_request_of_32_at_most_and_are_counted",
            ),
            ("block/tests/contract/requests.rs", "merging_keeps_within_the_limits_of_the_medium"),
            ("block/tests/contract/requests.rs", "what_overlaps_keeps_its_order"),
            (
                "block/tests/contract/requests.rs",
                "a_run_that_fails_is_done_again_member_by_member_so_that_each_has_its_own_outcome",
            ),
        ],
    ),
    (
        "notifiers",
        &[("block/tests/contract/backends.rs", "a_backend_outlives_its_medium_and_who_asked_is_told_of_each")],
    ),
    (
        "operation blockers",
        &[("block/tests/contract/graph.rs", "a_blocked_operation_is_refused_with_the_name_of_the_blocker")],
    ),
    (
        "root state",
        &[("block/tests/contract/backends.rs", "a_backend_outlives_its_medium_and_who_asked_is_told_of_each")],
    ),
    (
        "sync helpers",
        &[
            ("block/tests/contract/contexts.rs", "reads_writes_and_flushes_wait_for_their_end"),
            ("block/tests/contract/contexts.rs", "an_iothread_must_not_wait_for_itself"),
        ],
    ),
    (
        "geometry, block sizes",
        &[
            (
                "block/tests/contract/contexts.rs",
                "block_sizes_are_those_of_the_host_device_and_so_is_geometry_where_there_is_one",
            ),
            ("block/drivers/file/probe.rs", "a_whole_disk_has_the_geometry_that_the_host_says"),
        ],
    ),
    (
        "media change",
        &[
            ("block/tests/contract/media.rs", "a_change_of_medium_ejects_the_old_one_and_loads_the_new_one"),
            ("block/tests/contract/media.rs", "a_change_that_fails_brings_the_old_medium_back"),
            ("tests/monitor/under_load.rs", "a_change_of_medium_under_load_loses_no_request_and_mixes_no_media"),
        ],
    ),
];

/// The calls of QEMU's interface of 2014, each with the file and the name of what does the same here. Those of formats
/// that are not there yet (compressed writes, vmstate, commit) and of devices that pass commands on (ioctl, sg) have no
/// place.
const CALLS: &[(&str, &str, &str)] = &[
    ("blk_new", "block/backend.rs", "new"),
    ("blk_new_with_bs", "block/backend.rs", "with_root"),
    ("blk_new_open", "block/backends.rs", "open_backend"),
    ("blk_ref, blk_unref, blk_get_refcnt", "block/backend.rs", "new"),
    ("blk_name", "block/backend.rs", "name"),
    ("blk_by_name", "block/backends.rs", "find_backend"),
    ("blk_next", "block/backends.rs", "all_backends"),
    ("monitor_add_blk", "block/backends.rs", "name_backend"),
    ("monitor_remove_blk", "block/backends.rs", "unname_backend"),
    ("blk_hide_on_behalf_of_hmp_drive_del", "block/backends.rs", "drive_del"),
    ("blk_bs", "block/backend/root.rs", "root"),
    ("blk_insert_bs", "block/backend/root.rs", "insert"),
    ("blk_remove_bs", "block/backend/root.rs", "remove"),
    ("blk_update_root_state, blk_get_root_state", "block/backend/root.rs", "root_state"),
    ("blk_attach_dev, blk_detach_dev, blk_set_dev_ops", "block/backend/device.rs", "attach"),
    ("blk_get_attached_dev", "block/backend/device.rs", "has_device"),
    ("blk_dev_is_tray_open", "block/backend/device.rs", "is_tray_open"),
    ("blk_read, blk_pread", "block/backend/sync.rs", "read_blocking"),
    ("blk_write, blk_pwrite", "block/backend/sync.rs", "write_blocking"),
    ("blk_flush", "block/backend/sync.rs", "flush_blocking"),
    ("blk_read_unthrottled", "block/backend/throttling.rs", "hurry"),
    ("blk_aio_readv", "block/backend/channel.rs", "preadv"),
    ("blk_aio_writev", "block/backend/channel.rs", "pwritev"),
    ("blk_aio_flush", "block/backend/channel.rs", "flush"),
    ("blk_aio_discard", "block/backend/channel.rs", "pdiscard"),
    ("blk_aio_write_zeroes, blk_write_zeroes", "block/backend/channel.rs", "pwrite_zeroes"),
    ("blk_aio_multiwrite", "block/backend/plug.rs", "plug"),
    ("blk_aio_cancel", "block/backend/cancel.rs", "cancel"),
    ("blk_drain", "block/backend.rs", "drain_begin"),
    ("blk_drain_all", "block/backends.rs", "drain_all"),
    ("blk_flush_all", "block/backends.rs", "flush_all"),
    ("blk_set_on_error", "block/backend/errors.rs", "set_on_error"),
    ("blk_get_on_error", "block/backend/errors.rs", "on_error"),
    ("blk_get_error_action, blk_error_action", "block/backend/errors.rs", "error_action"),
    ("blk_iostatus", "block/backend/errors.rs", "iostatus"),
    ("blk_iostatus_reset", "block/backend/errors.rs", "reset_iostatus"),
    ("blk_is_read_only", "block/backend/root.rs", "is_read_only"),
    ("blk_is_inserted", "block/backend/root.rs", "is_inserted"),
    ("blk_is_available, blk_getlength", "block/backend/root.rs", "length"),
    ("blk_eject, blk_lock_medium", "block/dev_ops.rs", "eject_request"),
    ("blk_get_max_transfer_length, blk_get_max_iov", "block/limits.rs", "transfer_max"),
    ("blk_blockalign", "block/iovec.rs", "new"),
    ("blk_set_guest_block_size", "block/backend.rs", "set_block_size"),
    ("blk_probe_blocksizes, blk_probe_geometry", "block/backend/root.rs", "limits"),
    ("blk_op_is_blocked", "block/node/blockers.rs", "check_operation"),
    ("blk_op_block_all, blk_op_unblock_all", "block/node/blockers.rs", "block_operations"),
    ("blk_get_aio_context", "block/backend/context.rs", "aio_context"),
    ("blk_set_aio_context", "block/backend/context.rs", "set_aio_context"),
    (
        "blk_add_aio_context_notifier, blk_add_close_notifier, blk_add_insert_bs_notifier, blk_add_remove_bs_notifier",
        "block/backend/notifiers.rs",
        "notify",
    ),
    ("blk_io_plug, blk_io_unplug", "block/backend/plug.rs", "plug"),
    ("blk_get_stats", "block/backend/statistics.rs", "statistics"),
    ("blk_truncate", "block/backend/root.rs", "resize"),
    ("blk_invalidate_cache", "block/node/control.rs", "activate"),
];

fn source(file: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{file}: {error}"))
}

#[test]
fn every_row_has_its_tests() {
    for (theme, tests) in ROWS {
        assert!(!tests.is_empty(), "{theme} has no test");
        for (file, test) in *tests {
            let source = source(file);
            let at = source.find(&format!("fn {test}()")).unwrap_or_else(|| panic!("{theme}: {file} has no {test}"));
            let attributes = source[..at].rsplit("\n\n").next().unwrap_or("");
            assert!(attributes.contains("#[test]") && !attributes.contains("#[ignore"), "{theme}: {test} does not run");
        }
    }
}

#[test]
fn every_call_of_the_interface_lives_somewhere() {
    for (call, file, name) in CALLS {
        assert!(
            source(file).contains(&format!("fn {name}(")) || source(file).contains(&format!("fn {name}<")),
            "{call}: {file} has no {name}"
        );
    }
}
