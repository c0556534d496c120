// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

/// @title Payment of jobs in SNO or the chain's coin: deposited by the user, settled by rounds as work is verified.
/// @notice For every escrow: paid + fee + refunded + remaining = deposited, each wei once.
interface IEscrow {
    struct Payment {
        address to;
        uint256 amount;
    }

    /// @notice One job's share of a round: payments leave the escrow and with them the fee, which is burned; `refund` goes
    /// back to the payer. A job paid in coin has no fee here: what the rules give to signers is among its payments.
    struct Settlement {
        bytes32 escrowId;
        uint256 refund;
        Payment[] payments;
    }

    struct Account {
        address payer;
        uint32 networkId;
        uint40 deadline;
        bool inCoin;
        uint256 deposited;
        uint256 remaining;
    }

    event Deposited(
        uint32 indexed networkId, bytes32 indexed escrowId, address indexed payer, bytes32 jobId, uint256 amount, bool inCoin
    );
    event Settled(bytes32 indexed escrowId, uint256 paid, uint256 fee, uint256 refunded);
    /// @notice The escrow no longer held what the round wanted from it; nothing was moved.
    event SettlementSkipped(bytes32 indexed escrowId, uint256 wanted, uint256 remaining);
    event Refunded(bytes32 indexed escrowId, uint256 amount);
    event Credited(address indexed account, uint256 amount, bool inCoin);
    event Withdrawn(address indexed account, uint256 amount);
    event CoinWithdrawn(address indexed account, address to, uint256 amount);

    error OnlyRounds(address caller);
    error NothingDeposited();
    error DeadlineTooEarly(uint256 deadline, uint256 earliest);
    error NotYetRefundable(uint256 until);
    error UnknownEscrow(bytes32 escrowId);
    error NothingToWithdraw(address account);
    error OtherCurrency(bytes32 escrowId);
    error ReceiverRefused(address receiver);

    /// @notice The escrow of `payer`'s job: the payer is part of it, so that nobody can take another's job id first.
    function escrowIdOf(uint32 networkId, address payer, bytes32 jobId) external pure returns (bytes32);

    /// @notice Adds `amount` wei of SNO to the caller's job (approve first) and moves its deadline, only ever later.
    function deposit(uint32 networkId, bytes32 jobId, uint256 amount, uint40 deadline)
        external
        returns (bytes32 escrowId);

    /// @notice The same in the chain's coin. One job is paid in one currency.
    function depositCoin(uint32 networkId, bytes32 jobId, uint40 deadline) external payable returns (bytes32 escrowId);

    /// @notice Only by Rounds: moves payments, refunds and the fee of `feeBps` / 10,000 of what is paid in SNO, and returns
    /// the fees burned. A settlement its escrow cannot cover is skipped with an event, never blocks the round.
    function settle(uint32 networkId, Settlement[] calldata settlements, uint256 feeBps)
        external
        returns (uint256 fees);

    /// @notice Credits what remains to the payer, once the deadline and the dispute window are over, or no round was
    /// executed for seven days. Callable by anyone.
    function refund(bytes32 escrowId) external;

    /// @notice Pays out the SNO that `account` was credited. Callable by anyone, paid to the owner.
    function withdraw(address account) external;

    /// @notice Pays the caller's credit in coin to `to`. Only the owner can: a contract may have to name another receiver.
    function withdrawCoin(address payable to) external;

    function accounts(bytes32 escrowId)
        external
        view
        returns (
            address payer,
            uint32 networkId,
            uint40 deadline,
            bool inCoin,
            uint256 deposited,
            uint256 remaining
        );

    /// @notice The contract that executes rounds.
    function rounds() external view returns (address);

    /// @notice Seconds after a deadline in which only rounds move a job's money.
    function disputeWindow() external view returns (uint256);

    /// @notice Wei of SNO that `account` can withdraw.
    function credits(address account) external view returns (uint256);

    /// @notice Wei of the chain's coin that `account` can withdraw.
    function coinCredits(address account) external view returns (uint256);
}
