// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title Who takes part in which network: accounts, their node keys, stakes, reputations and hash-chain tips.
/// @notice Everything is scoped by `networkId`; one account holds one role per network under one node key.
interface IRegistry {
    enum Role {
        None,
        User,
        Worker,
        Validator
    }

    /// @notice One member with its state, as nodes poll it.
    /// @param index place in the network's list, fixed for ever; reputations are addressed by it
    /// @param live counts now: the key is its own, not exited, not blacklisted, stake at least the role's; a validator is
    /// in the epoch
    /// @param verified a round has verified that account and node key belong together
    /// @param capability class of a worker, as the round that admitted it says; 0 for others
    struct Member {
        address account;
        Role role;
        bool live;
        uint8 reputation;
        uint32 index;
        uint64 exitAt;
        uint256 stake;
        bytes32 keyHash;
        bytes32 tip;
        bool verified;
        uint32 capability;
    }

    /// @notice A member whose node key validators have verified to be its own, with what they found a worker to be capable
    /// of. Given again, it changes the class.
    struct Admission {
        uint32 index;
        uint32 capability;
    }

    /// @notice A loss of stake decided in a round.
    struct Slash {
        uint32 index;
        uint256 amount;
    }

    event Registered(
        uint32 indexed networkId, address indexed account, Role role, uint32 index, bytes32 keyHash, uint256 stake
    );
    event Admitted(uint32 indexed networkId, address indexed account, uint256 index, uint32 capability);
    event KeyRotated(uint32 indexed networkId, address indexed account, bytes32 revokedKeyHash, bytes32 keyHash);
    event EquivocationProven(uint32 indexed networkId, address indexed account);
    event ExitRequested(uint32 indexed networkId, address indexed account, uint256 withdrawableAt);
    event Withdrawn(uint32 indexed networkId, address indexed account, uint256 amount);
    event Slashed(uint32 indexed networkId, address indexed account, uint256 amount);
    event ReputationsUpdated(uint32 indexed networkId, bytes updates);
    event TipPosted(uint32 indexed networkId, address indexed account, bytes32 tip);
    event ValidatorJoined(uint32 indexed networkId, address indexed account);
    event ValidatorLeft(uint32 indexed networkId, address indexed account);

    error OnlyRounds(address caller);
    error UnknownNetwork(uint32 networkId);
    error UnknownRole();
    error AlreadyRegistered(address account);
    error KeyTaken(bytes32 keyHash, address owner);
    error ZeroKey();
    error Blacklisted(address account);
    error Convicted(address account);
    error NotRegistered(address account);
    error NotAValidator(address account);
    error ExitNotRequested(address account);
    error StakeLocked(uint256 until);
    error BadReputationUpdate(uint256 offset);
    error ValidatorStakeIsZero();

    /// @notice Joins network `networkId` in `role` under the node key with SHA-256 `keyHash`, taking the role's stake from
    /// the caller (approve it first). The member is live when a round admits it; until then several accounts may ask for
    /// one key, so that nobody squats it. Before a network's first round the first to come is live at once, unverified. A
    /// member that has exited and withdrawn may come back, with its old reputation.
    function register(Role role, bytes32 keyHash, uint32 networkId) external returns (uint32 index);

    /// @notice Revokes the caller's node key at once and asks for `keyHash` in its place; index, stake and reputation stay, a
    /// validator stays in the epoch. The next round verifies the new key as at registration. A key that was verified is
    /// never registered again, by nobody; `accountOf` still names the account that answers for what it signed.
    function rotateKey(bytes32 keyHash, uint32 networkId) external;

    /// @notice Stops taking part at once; the stake can be withdrawn after `exitDelay` seconds.
    function requestExit(uint32 networkId) external;

    /// @notice Pays the caller's stake back once its exit delay is over.
    function withdraw(uint32 networkId) external;

    /// @notice A live validator's next hash-chain tip.
    function postTip(uint32 networkId, bytes32 tip) external;

    // -- only by Rounds ------------------------------------------------------------------------------------------------

    /// @notice Writes reputations from packed updates (see ReputationUpdates.sol for the format; zero blacklists), burns the
    /// stake of the convicted, slashes, never more than there is, and admits members.
    function applyRound(
        uint32 networkId,
        bytes calldata reputations,
        Admission[] calldata admissions,
        Slash[] calldata slashes
    ) external;

    /// @notice Takes a validator that signed twice out of the epoch and blacklists it; its stake is burned with the next
    /// round.
    function convict(uint32 networkId, address account) external;

    /// @notice Opens a network; called by Rounds' one-time setup.
    function openNetwork(uint32 networkId) external;

    // -- views ---------------------------------------------------------------------------------------------------------

    /// @notice The contract that executes rounds.
    function rounds() external view returns (address);

    /// @notice Seconds from asking to leave until the stake can be withdrawn.
    function exitDelay() external view returns (uint256);

    /// @notice The live validators among those who signed `digest`, 20 bytes each in ascending order, their number, and
    /// how many live validators there are. `signatures` are in ascending order of signer: see Quorum.sol.
    function liveSigners(uint32 networkId, bytes32 digest, bytes calldata signatures)
        external
        view
        returns (bytes memory signers, uint256 found, uint256 live);

    function isLiveValidator(uint32 networkId, address account) external view returns (bool);

    /// @notice The validators of the epoch.
    function validators(uint32 networkId) external view returns (address[] memory);

    /// @notice Members `from` .. `from + count - 1` (fewer at the end), and how many there are in all.
    function members(uint32 networkId, uint256 from, uint256 count)
        external
        view
        returns (Member[] memory page, uint256 total);

    /// @notice The member of `account`; `role` is None where there is none.
    function memberOf(uint32 networkId, address account) external view returns (Member memory);

    /// @notice The account that a node key is or, before it was revoked, was bound to; or zero.
    function accountOf(uint32 networkId, bytes32 keyHash) external view returns (address);

    /// @notice 0 = blacklisted or never registered, 1 = newcomer, 255 = best.
    function reputation(uint32 networkId, uint256 index) external view returns (uint8);

    /// @notice The stake that `role` must bring.
    function stakeOf(Role role) external view returns (uint256);
}
