$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
frobnicate
read
read 0
read x 512
read 0 x
read 0 1Z
read -Z 0 512
read 0 3G
write 0 512 3
flush 1
truncate x
alloc x
read -l 5 0 512
discard 0
sleep
read -P
