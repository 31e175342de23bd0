//! The secrets that all generations of the server share, and the connection ids that tell the
//! generations apart.

use std::{sync::Arc, time::Duration};

use quinn::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig, ServerConfig, TransportConfig,
    rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use ring::{
    hkdf::{HKDF_SHA256, Salt},
    hmac,
    rand::{SecureRandom, SystemRandom},
};

use crate::{Result, other};

const SEED_BYTES: usize = 32;

/// A client that is silent for longer is given up.
const LONGEST_SILENCE: Duration = Duration::from_secs(120);

/// A certificate with its key, and a seed for further keys.
pub(crate) struct Secrets {
    seed: [u8; SEED_BYTES],
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Secrets {
    pub(crate) fn generate() -> Result<Self> {
        let mut seed = [0; SEED_BYTES];
        SystemRandom::new().fill(&mut seed).map_err(|_| other("no random numbers"))?;
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let key = certified.signing_key.serialize_der();
        Ok(Self { seed, certificate: certified.cert.into(), key })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let length = (self.key.len() as u32).to_be_bytes();
        [&self.seed[..], &length, &self.key, &self.certificate].concat()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let read = || {
            let (seed, rest) = bytes.split_first_chunk()?;
            let (length, rest) = rest.split_first_chunk()?;
            let (key, certificate) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
            Some(Self { seed: *seed, certificate: certificate.to_vec().into(), key: key.to_vec() })
        };
        Ok(read().ok_or_else(|| other("the running server has not sent its secrets"))?)
    }

    pub(crate) fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    pub(crate) fn server_config(&self) -> Result<ServerConfig> {
        let key = PrivatePkcs8KeyDer::from(self.key.clone());
        let mut config =
            ServerConfig::with_single_cert(vec![self.certificate.clone()], key.into())?;
        let mut transport = TransportConfig::default();
        transport.max_idle_timeout(Some(LONGEST_SILENCE.try_into()?));
        config.transport_config(Arc::new(transport));
        config.token_key(Arc::new(Salt::new(HKDF_SHA256, b"tokens").extract(&self.seed)));
        Ok(config)
    }

    pub(crate) fn endpoint_config(&self, ids: ConnectionIds) -> EndpointConfig {
        let mut config =
            EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &self.seed)));
        config.cid_generator(move || Box::new(ids.clone()));
        config
    }

    pub(crate) fn connection_ids(&self, generation: u32) -> ConnectionIds {
        let key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.seed), b"connection ids");
        ConnectionIds { key: hmac::Key::new(hmac::HMAC_SHA256, key.as_ref()), generation }
    }
}

const NONCE_BYTES: usize = 8;
const ID_BYTES: usize = 16;

/// Connection ids that show their generation to a process that has the key, and look random to
/// others: 8 random bytes, then the generation and 4 zero bytes, both masked.
#[derive(Clone)]
pub(crate) struct ConnectionIds {
    key: hmac::Key,
    generation: u32,
}

impl ConnectionIds {
    /// Returns the generation whose connection a datagram belongs to (RFC 9000, section 17).
    pub(crate) fn owner(&self, datagram: &[u8]) -> Option<u32> {
        let is_long = datagram.first()? & 0x80 != 0;
        let id = if is_long {
            // The length of the id follows the version. The first id of a connection is chosen by
            // the client, and has no generation.
            let (&length, rest) = datagram.get(5..)?.split_first()?;
            rest.get(..length.into()).filter(|id| id.len() == ID_BYTES)?
        } else {
            datagram.get(1..1 + ID_BYTES)?
        };
        let (nonce, masked) = id.split_first_chunk()?;
        let [g0, g1, g2, g3, zeros @ ..] = self.masked(nonce, masked.try_into().ok()?);
        (zeros == [0; 4]).then_some(u32::from_be_bytes([g0, g1, g2, g3]))
    }

    fn masked(&self, nonce: &[u8; NONCE_BYTES], mut bytes: [u8; 8]) -> [u8; 8] {
        let mask = hmac::sign(&self.key, nonce);
        bytes.iter_mut().zip(mask.as_ref()).for_each(|(byte, mask)| *byte ^= mask);
        bytes
    }
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut nonce = [0; NONCE_BYTES];
        SystemRandom::new().fill(&mut nonce).expect("the kernel has random numbers");
        let mut generation = [0; 8];
        generation[..4].copy_from_slice(&self.generation.to_be_bytes());
        ConnectionId::new(&[nonce, self.masked(&nonce, generation)].concat())
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
