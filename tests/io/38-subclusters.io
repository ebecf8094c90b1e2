$ create -q -f qcow2 -o extended_l2=on,cluster_size=128k disk 4M
@ -f qcow2 -d unmap disk
write -P 1 0 4k
write -P 2 8k 4k
read -P 0 4k 4k
read -P 1 0 4k
read -P 2 8k 4k
write -z 0 4k
read -P 0 0 8k
discard 0 128k
read -P 0 8k 4k
