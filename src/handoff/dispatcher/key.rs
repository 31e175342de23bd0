//! Keys of connections, and the order in which a key prefers workers.
//!
//! Both are fixed functions, so that a key does not move when the dispatcher is built with another
//! release of Rust, whose `DefaultHasher` may be another one.

use super::{Address, WorkerId};

/// Returns the number of a key: FNV-1a of its bytes, with 64 bits.
pub(super) fn key_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Returns the number of a client's address without its port, the default key.
pub(super) fn key_of_client(address: &Address) -> u64 {
    use std::{net::IpAddr, os::unix::ffi::OsStrExt};

    match address {
        Address::Ip(address) => match address.ip() {
            IpAddr::V4(ip) => key_of(&ip.octets()),
            IpAddr::V6(ip) => key_of(&ip.octets()),
        },
        Address::Path(path) => key_of(path.as_os_str().as_bytes()),
        Address::Abstract(name) => key_of(name),
        _ => key_of(&[]),
    }
}

/// Returns the rank of a worker for a key (rendezvous hashing). When a worker leaves, only the keys
/// that preferred it get another one.
pub(super) fn order_of(key: u64, worker: WorkerId) -> u64 {
    mix(key ^ mix(worker.0))
}

/// The last step of SplitMix64, by which each bit of the input changes about half of the output.
/// FNV-1a alone would leave the high bits of similar inputs alike.
fn mix(input: u64) -> u64 {
    let input = (input ^ (input >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let input = (input ^ (input >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    input ^ (input >> 31)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    /// The first three are test vectors of the authors of FNV.
    #[test]
    fn the_numbers_of_keys_and_of_workers_are_fixed() {
        assert_eq!(key_of(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(key_of(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(key_of(b"foobar"), 0x8594_4171_f739_67e8);
        let client = Address::from("10.0.0.7:1234".parse::<SocketAddr>().unwrap());
        assert_eq!(key_of_client(&client), key_of(&[10, 0, 0, 7]));
        let order = |key: &str| {
            let mut workers = Vec::from_iter((1..=8).map(WorkerId));
            workers.sort_by_key(|worker| order_of(key_of(key.as_bytes()), *worker));
            workers.into_iter().map(|worker| worker.0).collect::<Vec<_>>()
        };
        assert_eq!(order("tenant 7"), [3, 2, 6, 1, 4, 8, 5, 7]);
        assert_eq!(order("tenant 8"), [8, 6, 4, 2, 7, 3, 1, 5]);
    }

    #[test]
    fn keys_are_spread_evenly_and_few_move_when_a_worker_comes_or_goes() {
        const KEYS: u32 = 10_000;
        let first = |key: u32, workers: std::ops::Range<u64>| {
            let key = key_of(&key.to_be_bytes());
            workers.map(WorkerId).min_by_key(|worker| order_of(key, *worker)).unwrap()
        };
        let mut count = [0; 10];
        let mut moved = 0;
        for key in 0..KEYS {
            let worker = first(key, 0..10);
            count[worker.0 as usize] += 1;
            let with_more = first(key, 0..11);
            moved += u32::from(with_more != worker);
            assert!(with_more == worker || with_more == WorkerId(10));
        }
        assert!(count.iter().all(|count| (900..1100).contains(count)), "{count:?}");
        assert!((800..1020).contains(&moved), "{moved}");
    }
}
