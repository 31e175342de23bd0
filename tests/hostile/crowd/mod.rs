//! A hundred hostile connections of each sort, beside an honest one.
//!
//! One process, the victim, serves all of them on one thread. A second process has the attackers.
//! The test has the honest client, and reads the number of threads and descriptors and the memory
//! of the victim from `/proc`.

mod attack;
mod attackers;
mod process;
mod sorts;
mod victim;

use std::{
    os::{linux::net::SocketAddrExt, unix::net::SocketAddr},
    process::Command,
};

use fdwire::SocketKind;

use crate::{
    common::{other_uid, skipped},
    counted,
};
use attack::{Attack, Resources};
use process::Identity;
use sorts::Sort;

fn kind_of(is_stream: bool) -> SocketKind {
    if is_stream { SocketKind::Stream } else { SocketKind::SeqPacket }
}

fn addr_of(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(name).unwrap()
}

/// Attacks a victim with these sorts, one after the other, on each kind of socket that has them.
fn withstand(attack: &Attack, sorts: &[Sort]) {
    counted(async |kind| {
        if attack.victim == Identity::UserNamespace && !can_make_a_user_namespace() {
            return skipped("a user namespace cannot be made here");
        }
        for sort in sorts.iter().filter(|sort| sort.exists_on(kind)) {
            attack.withstand(*sort, kind).await;
        }
    });
}

fn can_make_a_user_namespace() -> bool {
    Command::new("unshare")
        .args(["--user", "true"])
        .output()
        .is_ok_and(|output| output.status.success())
}

#[test]
fn silent_peers_harm_nobody() {
    withstand(&Attack::default(), &[Sort::Silent]);
}

#[test]
fn peers_that_send_byte_by_byte_harm_nobody() {
    withstand(&Attack::default(), &[Sort::Drip]);
}

#[test]
fn peers_that_do_not_finish_a_large_frame_take_no_more_memory_than_its_limit() {
    withstand(&Attack::default(), &[Sort::LargeFrame]);
}

#[test]
fn peers_that_do_not_send_promised_descriptors_harm_nobody() {
    withstand(&Attack::default(), &[Sort::PromisedFds]);
}

#[test]
fn peers_that_send_descriptors_without_a_frame_have_no_more_than_the_limit_open() {
    withstand(&Attack::default(), &[Sort::UnclaimedFds]);
}

#[test]
fn connections_that_hold_their_own_peers_are_ended() {
    withstand(&Attack::default(), &[Sort::OwnEnd]);
}

#[test]
fn slow_sockets_in_bad_frames_harm_nobody() {
    withstand(&Attack::default(), &[Sort::SlowSocket, Sort::SlowSocketFirst, Sort::Nested]);
}

#[test]
fn slow_sockets_in_good_frames_harm_nobody() {
    withstand(&Attack::default(), &[Sort::SlowSocketInFrame, Sort::SlowSocketEchoed]);
}

#[test]
fn a_flood_of_descriptors_leaves_others_their_turns() {
    withstand(&Attack::default(), &[Sort::Flood, Sort::FloodTaken]);
}

#[test]
fn descriptors_that_come_with_garbage_or_nothing_are_closed_as_fast_as_they_come() {
    withstand(&Attack::default(), &[Sort::BadFlood, Sort::EmptyPackets]);
}

#[test]
fn garbage_and_out_of_band_bytes_harm_nobody() {
    withstand(&Attack::default(), &[Sort::Garbage, Sort::OutOfBand]);
}

#[test]
fn peers_that_never_read_take_no_more_memory_than_the_limit() {
    withstand(&Attack::default(), &[Sort::NeverReads]);
}

#[test]
fn peers_that_connect_and_close_in_a_loop_harm_nobody() {
    withstand(&Attack::default(), &[Sort::ConnectsAndCloses]);
}

#[test]
fn peers_of_all_sorts_at_a_time_harm_nobody() {
    withstand(&Attack::default(), &[Sort::Mix]);
}

#[test]
fn peers_that_are_refused_harm_nobody() {
    let Some(uid) = other_uid() else { return };
    let attack = Attack { attackers: Identity::Uid(uid), are_refused: true, ..Attack::default() };
    let sorts = [
        Sort::SlowSocket,
        Sort::SlowSocketFirst,
        Sort::Nested,
        Sort::BadFlood,
        Sort::ConnectsAndCloses,
    ];
    withstand(&attack, &sorts);
}

#[test]
fn peers_harm_no_process_of_the_same_uid_without_the_rights_of_root() {
    let Some(uid) = other_uid() else { return };
    withstand(&Attack::within(Identity::Uid(uid)), &Sort::ALL);
}

#[test]
fn peers_harm_no_process_in_a_user_namespace() {
    withstand(&Attack::within(Identity::UserNamespace), &Sort::ALL);
}

/// The attackers use up the threads of the uid, and most of them do not get a connection.
#[test]
fn peers_do_not_stop_a_process_that_can_get_no_more_descriptors_and_threads() {
    let Some(uid) = other_uid() else { return };
    let resources = Resources::Few { fds: 80, threads: 20 };
    // Slow sockets could block the victim: the kernel closes descriptors that do not fit in the
    // middle of a receive.
    let sorts = Vec::from_iter(Sort::ALL.into_iter().filter(|sort| !sort.sends_slow_sockets()));
    withstand(&Attack { resources, ..Attack::within(Identity::Uid(uid)) }, &sorts);
}

#[test]
fn a_uid_that_attacks_leaves_descriptors_for_other_uids() {
    let Some(uid) = other_uid() else { return };
    let resources = Resources::FewForEachUid { fds: 1024 };
    let sorts = [Sort::Silent, Sort::PromisedFds, Sort::UnclaimedFds, Sort::OwnEnd, Sort::BadFlood];
    withstand(&Attack { resources, attackers: Identity::Uid(uid), ..Attack::default() }, &sorts);
}
